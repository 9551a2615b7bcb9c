"""What one operation costs on the real device: seconds, and the bytes it takes and gives back while it runs.

Each operation is run by itself on data made for it, never the model: the most memory held is one operation's
arguments, outputs and workspace. On CPU the workspace is read from the profiler's memory events, so oneDNN's
scratch and reordered weights count; what OpenMP workers and MKL allocate for themselves does not pass torch's
allocator and counts neither here nor in the measured peak.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_iter, tree_map

from memopt.errors import MemoptError
from memopt.facts import cost_key, facts
from memopt.operations import overload
from memopt.overlap import tried_as
from memopt.runtime import opcache
from memopt.runtime.opinputs import needed_bytes, real_arguments
from memopt.runtime.phases import cuda_peaks
from memopt.runtime.trace import record

logger = logging.getLogger("memopt")

SAFE = ("aten", "prims", "memopt")  # namespaces whose operations do nothing but compute: no collectives, no disk
FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, MemoptError)
FEWEST, REPEATS = 5, 12  # runs timed: no more than the fewest once ENOUGH seconds went into an operation
ENOUGH = 0.03
BURST = 8  # runs timed together on CUDA
LONG = 0.5  # seconds: an operation that takes longer is timed once
AGREE = 1.25  # the two least of the times differ by no more, or more runs are timed, up to PATIENT
PATIENT = 40
# A cost that was remembered is doubted, and measured again once a process, where it is above what a slow processor
# would take: seconds, and those of a byte and of a floating-point operation.
DOUBT, DOUBT_BYTE, DOUBT_FLOP = 2e-4, 1e-9, 5e-10


@dataclass(frozen=True, slots=True)
class OpCost:
    """seconds: least of a few runs. workspace: bytes held inside the call beyond its outputs, given back at its end.

    out_bytes: bytes of the storages the call brought to life and returned.
    """

    seconds: float
    workspace: int
    out_bytes: int


class OpCosts:
    """Measures fx nodes of an ATen graph and remembers, in memory and (after `save`) on disk, by `cost_key`.

    byte_limit: operations with more bytes of arguments and outputs are not run; by default 1 GiB, on CUDA half of what
    is free: there the largest operations are those with workspaces. seconds_limit: measuring stops when so much time
    was spent in it, all together. cache: file to keep costs in; None for none, by default that of
    `opcache.cache_file`. As a context manager it saves at the end.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        byte_limit: int | None = None,
        seconds_limit: float = 60.0,
        cache: Path | str | None = "default",
    ) -> None:
        self.device = torch.device(device)
        self.byte_limit = _byte_limit(self.device) if byte_limit is None else byte_limit
        self.seconds_limit = seconds_limit
        self.spent = 0.0
        self.cache = opcache.cache_file(self.device) if cache == "default" else cache and Path(cache)
        self.known = {k: OpCost(*v) for k, v in opcache.load(self.cache).items()} if self.cache else {}
        self.fresh: dict[str, OpCost] = {}
        self.refused: dict[str, str] = {}  # key -> why it has no cost
        self.again: set[str] = set()  # measured by this process, or looked at and believed

    def __enter__(self) -> OpCosts:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.save()
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what operations were tried in would lie scattered among the step's blocks

    def save(self) -> None:
        """Add what was measured since the last save to the cache file."""
        if self.cache and self.fresh:
            entries = {key: (cost.seconds, cost.workspace, cost.out_bytes) for key, cost in self.fresh.items()}
            opcache.save(self.cache, entries)
            self.fresh.clear()

    def measure(self, node: fx.Node) -> OpCost | None:
        """The cost of one run of the node's operation, or None if it cannot or must not be run (`refused` says why)."""
        key = cost_key(node)
        if key in self.refused or (key in self.known and not self._doubted(key, node)):
            return self.known.get(key)
        if self.spent >= self.seconds_limit:
            return None
        self.again.add(key)
        start = time.perf_counter()
        try:
            cost = self._measured(node)
        except FAILURES as error:
            self.refused[key] = f"{type(error).__name__}: {error}"
            logger.debug("memopt: no cost of %s: %s", key, self.refused[key])
            return None
        finally:
            self.spent += time.perf_counter() - start
        self.known[key] = self.fresh[key] = cost if key not in self.known else cheaper(self.known[key], cost)
        return self.known[key]

    def _doubted(self, key: str, node: fx.Node) -> bool:
        """Whether to measure what is known again: it may have been measured on a machine too busy for it."""
        if key in self.again or self.spent >= self.seconds_limit or self.known[key].seconds > LONG:
            return False
        self.again.add(key)
        likely = DOUBT + DOUBT_BYTE * total_bytes(node) + DOUBT_FLOP * facts(node).flops
        return self.device.type == "cpu" and self.known[key].seconds > likely

    def workspace(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Workspace bytes of a call with tensors (fake or meta) like these; by formula, or 0, if it cannot be run."""
        tried = tried_as(str(op))
        if not tried:
            return 0
        node = called(overload(tried) if tried != str(op) else op, args, kwargs)
        cost = self.measure(node)
        return facts(node).workspace if cost is None else cost.workspace

    def measure_all(self, nodes: Iterable[fx.Node]) -> dict[str, OpCost]:
        """Costs by key of every node that can be measured, those with the most bytes first while time lasts."""
        keyed = {cost_key(node): node for node in nodes if isinstance(node.target, torch._ops.OpOverload)}
        for node in sorted(keyed.values(), key=total_bytes, reverse=True):
            self.measure(node)
        if self.spent >= self.seconds_limit:
            logger.info("memopt: stopped measuring operations after %.1f s", self.spent)
        return {key: self.known[key] for key in keyed if key in self.known}

    def _measured(self, node: fx.Node) -> OpCost:
        func = node.target
        if not isinstance(func, torch._ops.OpOverload) or func.namespace not in SAFE:
            raise MemoptError("not an operation that only computes")
        if total_bytes(node) > self.byte_limit:
            raise MemoptError(
                f"arguments and outputs take {total_bytes(node)} bytes, over the limit of {self.byte_limit}"
            )
        with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng(self._devices()):
            args, kwargs = real_arguments(node, self.device)
            cost = _cost(lambda: func(*args, **kwargs), _storages((args, kwargs)), self.device)
        _compare(node, cost)
        return cost

    def _devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


def cheaper(old: OpCost, new: OpCost) -> OpCost:
    """What is known after a second measurement: other programs only ever add seconds; bytes are the latest."""
    return new if new.seconds <= old.seconds else OpCost(old.seconds, new.workspace, new.out_bytes)


def _byte_limit(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**30


def called(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node:
    """A node, in a graph of its own, that calls the operation on tensors like these, which it does not keep alive."""
    graph = fx.Graph()

    def held(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        holder = graph.placeholder("given")
        holder.meta["val"] = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
        return holder

    given, named = tree_map(held, (tuple(args), dict(kwargs)))
    node = graph.call_function(op, given, named)
    values, words = fx.map_arg((node.args, node.kwargs), lambda holder: holder.meta["val"])
    node.meta["val"] = op(*values, **words)
    return node


def total_bytes(node: fx.Node) -> int:
    """Bytes of the operation's arguments and of what it makes, by its fake values."""
    return needed_bytes(node) + _made_bytes(node)


def _made_bytes(node: fx.Node) -> int:
    return sum(made.nbytes for made in facts(node).made if made is not None and made.home is None)


def _compare(node: fx.Node, cost: OpCost) -> None:
    """Say so when the real operation makes other bytes than its fake one."""
    if cost.out_bytes != _made_bytes(node):
        logger.debug("memopt: %s really makes %d bytes, not %d", cost_key(node), cost.out_bytes, _made_bytes(node))


def _cost(run: Callable[[], Any], given: set[int], device: torch.device) -> OpCost:
    first = _seconds(run, device)  # the first run loads libraries and fills caches: neither timed nor recorded
    seconds = (_seconds if first > LONG else _burst if device.type == "cuda" else least)(run, device)
    peak, out = _peak_cuda(run, device) if device.type == "cuda" else _peak_cpu(run)
    fresh = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(out)}
    out_bytes = sum(nbytes for storage, nbytes in fresh.items() if storage not in given)
    return OpCost(seconds, max(0, peak - out_bytes), out_bytes)


def least(run: Callable[[], Any], device: torch.device) -> float:
    """Least seconds of a few runs. Not the median, as other programs only ever add: on a busy machine the median of
    three made a product of 128 x 64 x 176 cost 68 ms instead of 0.05, and the plans made with it wrong for good."""
    times: list[float] = []
    while len(times) < FEWEST or (len(times) < REPEATS and sum(times) < ENOUGH) or _disagree(times):
        times.append(_seconds(run, device))
    return min(times)


def _disagree(times: Sequence[float]) -> bool:
    """Whether the least time stands alone: then it may still be one of a busy moment."""
    least, second = sorted(times)[:2]
    return second > AGREE * least and len(times) < PATIENT


def _burst(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one of several runs in a row, by the device's clock: as in a step, where nobody waits in between."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))
    for _ in range(BURST):
        run()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / BURST


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    end = time.perf_counter()
    del out  # giving the outputs back is not the operation's time
    return end - start


def _peak_cpu(run: Callable[[], Any]) -> tuple[int, Any]:
    out: list[Any] = []
    trace = record(lambda: out.append(run()))
    return trace.peak(), out


def _peak_cuda(run: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    before = torch.cuda.memory_allocated(device)
    with cuda_peaks(device, phases=False) as peaks:
        out = run()
        torch.cuda.synchronize(device)
    return peaks.peak - before, out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor)]


def _storages(values: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(values)}
