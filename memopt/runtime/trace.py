"""Every block torch's CPU allocator handed out and took back while some code ran, from the profiler's memory events.

What the events do not show, all of it checked in tests/runtime/test_trace.py or noted here (torch 2.13):
- the end of a block that was allocated before the recording: c10/core/CPUAllocator.cpp knows sizes of profiled blocks
  only, and for an address it saw in an earlier recording it may report a stale size. So an end counts only if its
  address was handed out within this recording; what was there before is the caller's to state (`resident`).
- other Python threads: profiler state is thread-local. CPU autograd runs in the calling thread and is seen.
- memory that does not come from the allocator: OpenMP's and MKL's own buffers, Python objects.
oneDNN's scratch and reordered weights do come from it and are seen, inside the op that took them.

Of the first end of an older block, and of every thousandth, torch tells on stderr ("Memory block of unknown size ...");
a training loop that lets go of its last loss is enough. Only TORCH_CPP_LOG_LEVEL=ERROR, set before torch is loaded,
stops it: the command line sets it, in Python it is the user's to set.
"""

from __future__ import annotations

import atexit
import gc
import os
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

from memopt.errors import MemoptError

MARK = (
    "memopt: "  # record_function ranges that start so are kept in a trace, under the name without it; no operation does
)


@dataclass(frozen=True, slots=True)
class Range:
    """A marked stretch of the recording. start, end: clock of the trace, ns."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Trace:
    """times: when each event happened, ns, ascending. levels: bytes held after it, over those at the start."""

    times: tuple[int, ...]
    levels: tuple[int, ...]
    ranges: tuple[Range, ...]

    def level_at(self, time: int) -> int:
        """Bytes held just before `time`, over those at the start of the recording."""
        at = self._first(time)
        return self.levels[at - 1] if at else 0

    def peak(self, start: int | None = None, end: int | None = None) -> int:
        """Most bytes held between two times (by default the whole recording), over those at its start."""
        first = 0 if start is None else self._first(start)
        last = len(self.levels) if end is None else self._first(end)
        before = self.levels[first - 1] if first else 0
        return max((before, *self.levels[first:last]))

    def named(self, name: str) -> tuple[Range, ...]:
        return tuple(found for found in self.ranges if found.name == name)

    def _first(self, time: int) -> int:
        return bisect_left(self.times, time)


def profiler_is_active() -> bool:
    """Whether a torch profiler runs in this thread. Starting a second one would end the first without a word."""
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def inside_backward() -> bool:
    """Whether autograd runs a node in this thread.

    A profiler must not be stopped there: after each node autograd restores the thread's state, and with it the stopped
    profiler's, so that ranges which end later write into events that are freed (torch 2.13: SIGSEGV some time after).
    """
    return torch._C._current_graph_task_id() != -1


class Recording:
    """A recording that begins now and ends with `stop`, where it cannot be a `with` block. One at a time.

    yielding: the one that runs and may be ended by a measurement the user asks for (`give_way`): a guard's.
    """

    yielding: ClassVar[Recording | None] = None

    def __init__(self, yields: bool = False) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else libkineto writes a line to stderr at each start and stop
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self.profile.__enter__()
        assert self.profile.profiler is not None
        # acc_events keeps torch 2.11 from warning of cycles. Within, it would have each event made a Python object at
        # the end, which nobody reads here: most of what a measurement took, and minutes where a guard's ran on long.
        self.profile.profiler.acc_events = False
        self.gave_way = False
        Recording.yielding = self if yields else None

    def give_way(self) -> None:
        """End without a result, so that another recording can begin; `stop` will return None."""
        self.gave_way = True
        Recording.yielding = None
        self.profile.__exit__(None, None, None)

    def abandon(self) -> None:
        """End it if it still runs in this thread: nobody is left who would stop it, and all that runs is recorded.

        Garbage may be collected in the middle of a backward: then at a later collection.
        """
        if Recording.yielding is not self or not profiler_is_active():
            return
        if inside_backward():
            weakref.finalize(_Garbage(), self.abandon)
        else:
            make_way()

    def stop(self, contested: bool = False) -> Trace | None:
        """The trace; None if another profiler was started meanwhile, which ended this one.

        contested: the other may still run, so look for it: stopping now would stop that one. Costs some 50 ms.
        """
        if self.gave_way:
            return None
        Recording.yielding = None
        assert self.profile.profiler is not None
        if not profiler_is_active() or (contested and self.taken_over()):
            self.profile.profiler.entered = False  # or later recordings would take it for one that still runs
            return None
        self.profile.__exit__(None, None, None)
        assert self.profile.profiler.kineto_results is not None
        return _read(self.profile.profiler.kineto_results.experimental_event_tree())

    def taken_over(self) -> bool:
        """Whether some other profiler object is between its start and its stop: torch keeps no list of them."""
        others = (found for found in gc.get_objects() if type(found) is torch.autograd.profiler.profile)
        return any(p.entered and p.kineto_results is None for p in others if p is not self.profile.profiler)


class _Garbage:
    """Lives until the garbage collector runs next."""

    def __init__(self) -> None:
        self.me = self


def make_way() -> bool:
    """End a guard's recording, if that is what runs: a later one goes first. Whether nothing runs any more.

    Its model may never take another step, and would keep every other from being watched.
    """
    running = Recording.yielding
    if running is not None and not inside_backward() and not running.taken_over():
        running.give_way()
    return not profiler_is_active()


atexit.register(make_way)  # a process that ends while a profiler records ends in a segmentation fault (torch 2.13)


def record(run: Callable[[], object]) -> Trace:
    """Run it once and return the trace of its CPU allocations. What it raises ends the recording and goes on.

    Raises MemoptError when a profiler is already active, or was started by `run` and left the recording cut short.
    """
    if profiler_is_active() and not make_way():
        raise MemoptError("a torch profiler is already running; measure outside it, since only one can be active")
    recording = Recording()
    try:
        run()
    finally:
        trace = recording.stop()
    if trace is None:
        raise MemoptError("a torch profiler was started inside what is being measured, which ended the measurement")
    return trace


def _read(roots: list[_ProfilerEvent]) -> Trace:
    blocks: list[tuple[int, int, int]] = []
    ranges: list[Range] = []
    for event in _walk(roots):
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":  # type: ignore[union-attr]
                blocks.append((event.start_time_ns, fields.ptr, fields.alloc_size))  # type: ignore[union-attr]
        elif event.name.startswith(MARK):
            ranges.append(Range(event.name.removeprefix(MARK), event.start_time_ns, event.end_time_ns))
    blocks.sort(key=lambda block: block[0])
    steps = list(changes(blocks))
    ranges.sort(key=lambda found: (found.start, -found.end))
    levels = tuple(accumulate(size for _, size in steps))
    return Trace(tuple(time for time, _ in steps), levels, tuple(ranges))


def _walk(roots: list[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    stack = list(roots)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def changes(blocks: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """(time, change in bytes) of blocks born in this recording; sizes at their end are those at their birth."""
    alive: dict[int, int] = {}
    for time, address, size in blocks:
        if size > 0:
            alive[address] = size
            yield time, size
        elif address in alive:
            yield time, -alive.pop(address)
