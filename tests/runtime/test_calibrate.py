"""Calibration: measured rates are kept whole, read back, refused when damaged, and used by the roofline."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from memopt.cost import Roofline
from memopt.devices import device
from memopt.graph import Step, StepGraph, Storage, TensorInfo
from memopt.kernels.codec import PACKED_BYTES
from memopt.runtime import calibrate
from memopt.runtime.calibrate import Rates, load_rates, measure_rates, rates_file, save_rates
from memopt.runtime.here import here
from memopt.tokens import elsewhere

CPU = torch.device("cpu")
RATES = Rates(8e9, 1e-6, {"fp32": 50e9, "bf16": 20e9, "fp16": 1e9}, {"int8": (1e9, 2e9)})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_CACHE_DIR", str(tmp_path / "cache"))


def product() -> tuple[StepGraph, Step]:
    """A matrix product of 1 Gflop and 3 MiB."""
    tensors = {name: TensorInfo(name, (512, 512), "float32", name) for name in "abc"}
    step = Step("mm", "aten.mm", "forward", ("a", "b"), ("c",), flops=10**9)
    storages = {name: Storage(name, 2**20) for name in "abc"}
    return StepGraph(("a", "b"), (step,), ("c",), tensors, storages), step


def test_uncalibrated_the_catalogue_speaks() -> None:
    assert load_rates(CPU) is None
    assert here(CPU) == device("cpu")


def test_kept_rates_are_what_the_roofline_uses() -> None:
    assert save_rates(CPU, RATES) == rates_file(CPU)
    assert load_rates(CPU) == RATES
    graph, step = product()
    assert Roofline(here(CPU)).seconds(graph, step) == pytest.approx(10**9 / 50e9 + 1e-6)
    assumed = device("cpu")
    assert Roofline(assumed).seconds(graph, step) == pytest.approx(
        10**9 / assumed.fp32 / assumed.efficiency + assumed.launch_seconds
    )
    assert [path.name for path in rates_file(CPU).parent.iterdir()] == [rates_file(CPU).name]


NEGATIVE = '{"schema": 2, "memory_bandwidth": -1, "launch_seconds": 1, "flops": {"fp32": 1, "bf16": 1, "fp16": 1}}'


ONE_WAY = NEGATIVE.replace("-1", "1").replace("}}", '}, "codecs": {"int8": [1e9]}}')


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2, "memory_bandwidth": 1}', NEGATIVE, ONE_WAY]
)  # fmt: skip
def test_a_damaged_calibration_is_ignored_with_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    rates_file(CPU).parent.mkdir(parents=True)
    rates_file(CPU).write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="memopt"):
        assert load_rates(CPU) is None
    assert "damaged calibration" in caplog.text


def test_packing_is_priced_by_what_its_codec_reaches() -> None:
    save_rates(CPU, RATES)
    x, held = TensorInfo("x", (1000,), "float32", "x"), TensorInfo("held", (1040,), "uint8", "held")
    pack = Step("to", "memopt.pack_int8.default", "forward", ("x",), ("held",))
    unpack = Step("back", "memopt.unpack_int8.default", "backward", ("held",), ("y",))
    tensors = {"x": x, "held": held, "y": TensorInfo("y", (1000,), "float32", "y")}
    storages = {name: Storage(name, 4000 if name != "held" else 1040) for name in tensors}
    graph = StepGraph(("x",), (pack, unpack), ("y",), tensors, storages)
    found = [Roofline(here(CPU)).seconds(graph, step) for step in graph.steps]
    assert found == pytest.approx([1000 / 1e9 + 1e-6, 1000 / 2e9 + 1e-6])


@pytest.mark.parametrize("percent", [5.0, 80.0])
def test_a_busy_machine_is_named(
    percent: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibrate.psutil, "cpu_percent", lambda interval: percent)
    calibrate.warn_if_busy(CPU)
    assert ("80 % of the processor's time" in caplog.text) == (percent > 50)


def test_measured_rates_order_the_work_as_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate.COPIED, "cpu", 4 * 2**20)
    monkeypatch.setitem(calibrate.SIDE, "cpu", 256)
    monkeypatch.setitem(calibrate.PACKED, "cpu", 2**18)
    rates = measure_rates(CPU)
    assert {*rates.codecs} == {name for name in PACKED_BYTES if not elsewhere(name)}
    assert all(rate > 0 for pair in rates.codecs.values() for rate in pair)
    assert rates.memory_bandwidth > 0
    assert set(rates.flops) == {"fp32", "bf16", "fp16"}
    assert rates.launch_seconds < 2 * 256**3 / rates.flops["fp32"]  # a tiny operation is quicker than 33 Mflop
