"""The device table: complete, sourced, ordered as hardware is, and free of torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import psutil
import pytest

from memopt.devices import CATALOGUE, GIB, Device, device

KNOWN = ["h200", "h100", "a100-80gb", "a100-40gb", "l40s", "l4", "rtx4090", "rtx3090", "t4", "cpu"]
GPUS = [name for name in KNOWN if name != "cpu"]
BOX = {"h200": 141, "h100": 80, "a100-80gb": 80, "a100-40gb": 40, "l40s": 48, "l4": 24, "rtx4090": 24, "rtx3090": 24,
       "t4": 16}  # fmt: skip


def test_the_table_has_the_devices_of_the_contract() -> None:
    assert list(CATALOGUE) == KNOWN
    assert all(entry.name == name for name, entry in CATALOGUE.items())


@pytest.mark.parametrize("name", KNOWN)
def test_every_figure_is_there_and_sourced(name: str) -> None:
    entry = device(name)
    assert entry.memory > 0
    assert min(entry.memory_bandwidth, entry.fp32, entry.host_to_device, entry.device_to_host) > 1e9
    assert 0 < entry.launch_seconds < 1e-4
    assert "Memory:" in entry.source
    assert (entry.compute_capability is None) == (entry.kind == "cpu")
    assert entry.allocator_block == (1 if entry.kind == "cpu" else 512)


@pytest.mark.parametrize("name", GPUS)
def test_rates_and_sizes_are_those_of_a_real_card(name: str) -> None:
    entry = CATALOGUE[name]
    assert 0.9 * BOX[name] * GIB < entry.memory < BOX[name] * GIB  # usable is below the number on the box
    assert entry.fp32 <= entry.fp16
    assert entry.bf16 in (0, entry.fp16)
    assert entry.tf32 in (0, entry.fp32) or entry.tf32 == pytest.approx(entry.bf16 / 2, rel=0.02)  # dense: half of bf16
    assert entry.fp8 == 0 or entry.fp8 == pytest.approx(2 * entry.bf16, rel=0.02)
    assert entry.host_to_device < entry.memory_bandwidth


def test_the_widest_dtype_decides() -> None:
    h200 = CATALOGUE["h200"]
    assert h200.flops({"float32", "bfloat16"}) == h200.fp32
    assert h200.flops({"bfloat16", "int64", "float8_e4m3fn"}) == h200.bf16
    assert h200.flops({"float16"}) == h200.fp16
    assert h200.flops({"float8_e5m2"}) == h200.fp8
    assert h200.flops({"int64"}) == h200.flops(set()) == h200.fp32


@pytest.mark.parametrize(("name", "dtype"), [("t4", "bfloat16"), ("a100-80gb", "float8_e4m3fn"), ("cpu", "float16")])
def test_without_units_for_a_dtype_the_fp32_rate_answers(name: str, dtype: str) -> None:
    assert CATALOGUE[name].flops({dtype}) == CATALOGUE[name].fp32 > 0


def test_the_cpu_has_this_machines_memory() -> None:
    assert 0 < device("cpu").memory <= psutil.virtual_memory().total


@pytest.mark.parametrize("name", ["", "h300", "cuda", "cuda:0", "a100", None, 7])
def test_unknown_names_are_refused_with_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match="known are h200, h100") as caught:
        device(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in KNOWN)


def test_names_are_read_as_people_type_them() -> None:
    assert device(" H200 ") is CATALOGUE["h200"]


def test_a_device_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        CATALOGUE["h200"].memory = 1  # type: ignore[misc]
    assert isinstance(CATALOGUE["h200"], Device)


def test_the_table_loads_neither_torch_nor_psutil() -> None:
    code = "import sys, memopt.devices; print({'torch', 'psutil', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
