"""The rates this device really reaches, measured once and kept: what the roofline uses instead of published peaks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from memopt.devices import Device
from memopt.files import write_atomic
from memopt.kernels.codec import PACKED_BYTES
from memopt.operations import overload
from memopt.runtime import opcache
from memopt.tokens import elsewhere

logger = logging.getLogger("memopt")

SCHEMA = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COPIED = {"cpu": 64 * 2**20, "cuda": 2**30}  # bytes of the copy: well above the caches
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices multiplied
PACKED = {"cpu": 4 * 2**20, "cuda": 2**28}  # bytes of the value packed
ROW = 1024  # elements of the value's last dimension
PACKS = {"bits": torch.bool, "uint8": torch.int64, "int16": torch.int64, "int32": torch.int64}  # others pack floats
BUSY = 0.25  # of the processor's time at other work, above which rates are doubted
LAUNCHES = 500
SLOW = 0.05  # seconds of a product, above which the next, eight times the work, is not run
FEWEST, MOST, ENOUGH = 3, 100, 0.3  # runs timed, until ENOUGH seconds went into them; the least counts, as others'
# work on the machine only ever adds: with five runs of 0.1 ms a busy machine once showed a hundredth of its rate


@dataclass(frozen=True)
class Rates:
    """memory_bandwidth: bytes a second, read and written; flops: dtype -> operations a second of a matrix product.

    launch_seconds: of an operation on one element. codecs: elements a second packed, and unpacked. links: bytes
    a second to the host and from it, of pinned memory; empty on the CPU, where nothing is between.
    """

    memory_bandwidth: float
    launch_seconds: float
    flops: Mapping[str, float] = field(default_factory=dict)
    codecs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    links: Sequence[float] = ()


def measure_rates(where: torch.device) -> Rates:
    """Run copies, matrix products in each dtype, a tiny operation and every codec. Takes some twenty seconds and
    COPIED * 2 bytes."""
    warn_if_busy(where)
    flops = {name: _matmul(where, dtype) for name, dtype in DTYPES.items()}
    codecs = {name: _codec(where, name) for name in sorted(PACKED_BYTES) if not elsewhere(name)}
    return Rates(_bandwidth(where), _launch(where), flops, codecs, _links(where))


def warn_if_busy(where: torch.device) -> None:
    """Threads that wait for each other beside other work are slower by far more than their share of the processor."""
    if where.type == "cpu" and (others := psutil.cpu_percent(interval=0.3) / 100) > BUSY:
        logger.warning(
            "memopt: %.0f %% of the processor's time goes to other work, and rates measured now may be far too low; "
            "calibrate again when it is idle", 100 * others,
        )  # fmt: skip


def _best(run: Callable[[], object], where: torch.device) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < ENOUGH):
        _wait(where)
        start = time.perf_counter()
        run()
        _wait(where)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _bandwidth(where: torch.device) -> float:
    source = torch.ones(COPIED[where.type], dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), where)


def _matmul(where: torch.device, dtype: torch.dtype) -> float:
    """The best of growing sizes, up to the full side or, where a dtype is slow (fp16 on most CPUs), to SLOW seconds."""
    best = 0.0
    for halvings in (3, 2, 1, 0):
        side = SIDE[where.type] >> halvings
        a, b = (torch.ones(side, side, device=where).to(dtype) for _ in range(2))
        seconds = _best(partial(torch.mm, a, b), where)
        best = max(best, 2 * side**3 / seconds)
        if seconds > SLOW:
            break
    return best


def _codec(where: torch.device, name: str) -> tuple[float, float]:
    """Elements a second packed and unpacked. Of a disk's codecs the folder decides (memopt.runtime.disk)."""
    dtype = PACKS.get(name, torch.float32)
    x = torch.randint(0, 2, (PACKED[where.type] // dtype.itemsize // ROW, ROW), device=where).to(dtype)
    packed = overload(f"memopt.pack_{name}.default")
    again = overload(f"memopt.unpack_{name}.default")
    held = packed(x, x.stride())
    pack = _best(lambda: packed(x, x.stride()), where)
    unpack = _best(lambda: again(held, x.shape, x.stride(), dtype), where)
    return x.numel() / pack, x.numel() / unpack


def _links(where: torch.device) -> tuple[float, ...]:
    if where.type != "cuda":
        return ()
    here = torch.ones(PACKED[where.type], dtype=torch.uint8, device=where)
    host = torch.empty(here.shape, dtype=torch.uint8, pin_memory=True)
    to, back = _best(lambda: host.copy_(here), where), _best(lambda: here.copy_(host), where)
    return here.nbytes / to, here.nbytes / back


def _launch(where: torch.device) -> float:
    one = torch.ones(1, device=where)

    def many() -> None:
        for _ in range(LAUNCHES):
            torch.neg(one)

    return _best(many, where) / LAUNCHES


def rates_file(where: torch.device) -> Path:
    """Where this device's rates are kept, under MEMOPT_CACHE_DIR."""
    return opcache.cache_dir() / "rates" / opcache.cache_file(where).name


def save_rates(where: torch.device, rates: Rates) -> Path:
    """Keep the rates, whole or not at all; returns the file."""
    path = rates_file(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"schema": SCHEMA, **asdict(rates)}, indent=1) + "\n")
    return path


def load_rates(where: torch.device) -> Rates | None:
    """The rates kept for this device with this torch; None if there are none, or, with a warning, none to be used."""
    path = rates_file(where)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.pop("schema") != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA}")
        return _checked(Rates(**body))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning(
            "memopt: ignoring the damaged calibration %s (%s); doctor --calibrate writes it anew", path, error
        )
        return None


def _checked(rates: Rates) -> Rates:
    if any(len(pair) != 2 for pair in rates.codecs.values()) or len(rates.links) not in (0, 2):
        raise ValueError("a codec or a link has no rate each way")
    codecs = (rate for pair in rates.codecs.values() for rate in pair)
    figures = [rates.memory_bandwidth, rates.launch_seconds, *rates.flops.values(), *codecs, *rates.links]
    if not all(isinstance(figure, int | float) and figure > 0 for figure in figures) or set(rates.flops) != set(DTYPES):
        raise ValueError("a rate is missing or not above zero")
    pairs = {name: (pair[0], pair[1]) for name, pair in rates.codecs.items()}
    return replace(rates, codecs=pairs, links=tuple(rates.links))


def calibrated(device: Device, where: torch.device) -> Device:
    """The device with its kept rates; as it is if it was never calibrated. What is reached needs no efficiency."""
    rates = load_rates(where)
    if rates is None:
        return device
    to_host, to_device = rates.links or (device.device_to_host, device.host_to_device)
    return replace(
        device,
        device_to_host=to_host,
        host_to_device=to_device,
        codecs={name: (pack, unpack) for name, (pack, unpack) in rates.codecs.items()},
        memory_bandwidth=rates.memory_bandwidth,
        launch_seconds=rates.launch_seconds,
        fp32=rates.flops["fp32"],
        bf16=rates.flops["bf16"],
        fp16=rates.flops["fp16"],
        efficiency=1.0,
        source=f"{device.source} Rates: measured here by `memopt doctor --calibrate`",
    )
