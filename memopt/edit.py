"""The one edit behind every trade: let a value go after its early reads, make it again before its late ones.

`edit` applies remakes to the photograph; `memopt.insertion.insert` applies the same remakes to the fx graph, and the
pipeline demands that both agree. Nobody writes byte effects down: the bytes of a plan are `peak(edit(graph, chosen))`.

How copies are placed. A remake serves the reads of its storage by steps inside its span. Just before the first such
step the value is made again: its unpack steps are copied there, and whatever those read that has itself a remake
covering the moment is made again first, recursively, in the original order of the steps. A copy is made once per
remake and shared by all reads in the span, so nested spans express recursion (a block boundary remade once for a
whole segment; the inside of a block remade for the block alone). A read no remake covers keeps the original alive:
any set of remakes is correct, only its bytes and seconds differ. Steps left without a reader are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from memopt.graph import Step, StepGraph, Storage, TensorInfo

GRADIENT = "gradient"  # a resource: squares of relative errors of the gradient, which add where errors are independent
HOST = "host"  # bytes in its memory
DISK = "disk"  # bytes there
TOKEN = 16  # bytes of what stands for a value that lies there


@dataclass(frozen=True, slots=True)
class Remake:
    """Make `value` (a storage) again for its reads by the steps from span[0] to span[1] (names, both included).

    trade: the trade that proposed it. unpack: the steps that make it again: as they stand in the graph (recompute:
    its producer), or new ones that read what was packed. pack: steps put right after the value is made (an offload's
    copy out); remakes of a value may name the same ones, which then run once. made: tensors and storages of the new
    steps, which the graph does not declare. seconds: the cost of the unpack and pack steps alone, without what they in
    turn need remade. takes: what packing takes of resources besides memory and time, by name (`taken`). stand_in:
    what it makes will do for the late steps of the graph, and for nobody else: copies read the original.

    drained, fetched: of a copy elsewhere that goes on while other steps run (memopt/overlap.py), where it is waited for
    on its way out (the last pack step stands behind this step) and where its way back begins (the first unpack step
    stands before this one, the second is the wait before the first read). Until the one and from the other the value
    takes its bytes, since these steps name it. Empty: both ways are awaited at once.
    """

    trade: str
    value: str
    span: tuple[str, str]
    unpack: tuple[Step, ...] = ()
    pack: tuple[Step, ...] = ()
    seconds: float = 0.0
    made: tuple[tuple[TensorInfo, Storage], ...] = ()
    takes: tuple[tuple[str, float], ...] = ()
    stand_in: bool = False
    drained: str = ""
    fetched: str = ""

    @property
    def repeats(self) -> bool:
        """Whether it runs one step of the graph again, and nothing else."""
        return len(self.unpack) == 1 and not self.pack and not self.made


@dataclass(slots=True)  # not frozen: a search makes a million of them, each of which would take three times as long
class Copy:
    """A step to place before another: `step` is the template, `tensors` maps its tensors to their copies."""

    step: Step
    name: str
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Schedule:
    """Where every copy stands. before[i]: copies in order, placed before original step i.

    reads[i]: original tensor -> the copy step i reads in its stead (missing: all reads stay).
    """

    before: dict[int, list[Copy]]
    reads: dict[int, dict[str, str]]


class Placer:
    """Walks the steps once and decides which copy each read is served from. Shared by both sides of the edit."""

    def __init__(self, graph: StepGraph, remakes: Iterable[Remake]) -> None:
        self.graph = graph
        self.spans: dict[str, list[tuple[int, int, int]]] = {}  # value -> (width, first position, remake)
        self.unpack: dict[int, dict[str, Step]] = {}
        self.stand_ins: set[int] = set()  # remakes, by their place
        self.unpacking: set[str] = set()  # steps of theirs
        self.early: dict[int, list[tuple[int, Step]]] = {}  # position -> remakes whose way back begins there
        self.waits: dict[int, Step] = {}  # remake -> the wait that its first reader still has to do
        for index, remake in enumerate(remakes):
            if remake.stand_in:
                self.stand_ins.add(index)
                self.unpacking.update(step.name for step in remake.unpack)
            first, last = (graph.position[name] for name in remake.span)
            self.spans.setdefault(remake.value, []).append((last - first, first, index))
            self.unpack[index] = {w: step for step in remake.unpack for w in step.writes}
            if remake.fetched:
                fetch, self.waits[index] = remake.unpack
                self.early.setdefault(graph.position[remake.fetched], []).append((index, fetch))
        self.served: dict[str, list[tuple[int, int, int]]] = {}  # tensor -> those of its value
        for value, spans in self.spans.items():
            spans.sort()  # the narrowest span that covers a moment serves it
            self.served.update(dict.fromkeys(graph.made_in.get(value, ()), spans))
        self.copies: dict[tuple[str, int], str] = {}
        self.counts: dict[str, int] = {}

    def covering(self, tensor: str, at: int, copying: bool = False) -> int | None:
        """Index of the remake that serves a read of `tensor` at position `at`, or None: the original does.

        copying: the reader is a copy, to which a stand-in is of no use."""
        for width, first, index in self.served.get(tensor, ()):
            if first <= at <= first + width:
                return None if copying and index in self.stand_ins else index
        return None

    def maker(self, tensor: str, remake: int) -> Step:
        """The step that makes this tensor again: from the remake's unpack, else (a view) the one that made it."""
        return self.unpack[remake].get(tensor) or self.graph.steps[self.graph.producer[tensor]]

    def schedule(self) -> Schedule:
        before: dict[int, list[Copy]] = {}
        reads: dict[int, dict[str, str]] = {}
        start = min((first for spans in self.spans.values() for _, first, _ in spans), default=0)
        reading = {at for value in self.spans for at in self.graph.uses.get(value, ()) if at >= start}
        for at in sorted(reading | self.early.keys()):
            step = self.graph.steps[at]
            if early := [self.begin(fetch, index) for index, fetch in self.early.get(at, ())]:
                before[at] = early
            if at not in reading or at in self.graph.viewing:
                continue  # who reads a view gets a view of the copy
            wanted = [name for name in step.reads if name in self.served]
            if placed := self.place(wanted, at):
                before.setdefault(at, []).extend(placed)
            if renamed := self.renamed(wanted, at):
                reads[at] = renamed
        return Schedule(before, reads)

    def begin(self, fetch: Step, index: int) -> Copy:
        """The step that starts a remake's way back, whoever may read it."""
        (value,) = fetch.writes
        count = self.counts[fetch.name] = self.counts.get(fetch.name, 0) + 1
        name = self.copies[value, index] = f"{fetch.name}__{count}"
        return Copy(fetch, name, {value: name})

    def wait(self, index: int) -> Copy:
        """The wait of what `begin` started, before it is read for the first time."""
        step = self.waits.pop(index)
        (value,) = step.reads
        count = self.counts[step.name] = self.counts.get(step.name, 0) + 1
        return Copy(step, f"{step.name}__{count}", {value: self.copies[value, index]})

    def renamed(self, tensors: Sequence[str], at: int, copying: bool = False) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in tensors:
            index = self.covering(name, at, copying) if name in self.served else None
            if index is not None:
                found[name] = self.copies[name, index]
        return found

    def place(self, wanted: Sequence[str], at: int) -> list[Copy]:
        """Copies needed so that every wanted tensor can be read at `at`, in the original order of their steps."""
        needed: dict[tuple[str, bool], Step] = {}
        waited: list[Copy] = []
        stack = [(name, False) for name in wanted]
        while stack:
            name, copying = stack.pop()
            index = self.covering(name, at, copying)
            if index is None or (name, index) in self.copies:
                if index in self.waits:
                    waited.append(self.wait(index))
                continue
            step = self.maker(name, index)
            copying = copying or not self.looks(step)
            if (step.name, copying) not in needed:
                needed[step.name, copying] = step
                stack.extend([(read, copying) for read in step.reads if read in self.served])
        # In the order the originals were made; an unpack that is no original step counts as its value's producer.
        made = self.graph.producer
        order = sorted(needed, key=lambda key: (made[needed[key].writes[0]], key))
        return [*waited, *(self.copy(needed[key], at, key[1]) for key in order)]

    def looks(self, step: Step) -> bool:
        """Whether it is a view of the graph: who reads a copy of it reads the value."""
        return bool(self.stand_ins) and step.name in self.graph.position and self.graph.is_view(step)

    def readers(self, step: Step, copying: bool) -> tuple[bool, ...]:
        """Whom a copy of the step serves: steps of the graph (False), copies (True), or both."""
        if not self.stand_ins or step.name in self.unpacking:
            return (False,)
        return (copying,) if self.looks(step) else (False, True)

    def copy(self, step: Step, at: int, copying: bool) -> Copy:
        count = self.counts[step.name] = self.counts.get(step.name, 0) + 1
        tensors = self.renamed(step.reads, at, copying)
        known, readers = step.name in self.graph.position, self.readers(step, copying)
        for name in step.writes:  # what unpacks is called like its step: a copy of the value's own maker is another
            tensors[name] = f"{name if known else step.name}__{count}"
            for reader in readers if name in self.served else ():
                index = self.covering(name, at, reader)
                if index is not None:
                    self.copies.setdefault((name, index), tensors[name])
        return Copy(step, f"{step.name}__{count}", tensors)


def edit(graph: StepGraph, remakes: Iterable[Remake]) -> StepGraph:
    """The step graph with every remake applied and unread steps dropped. Copies stand in the phase that reads them."""
    remakes = tuple(remakes)
    return edited_by(Placer(graph, remakes), remakes) if remakes else graph


def edited_by(placer: Placer, remakes: Sequence[Remake]) -> StepGraph:
    """As `edit`, by a fresh placer of these remakes, which then knows the copies it has made."""
    graph, schedule = placer.graph, placer.schedule()
    tensors, storages = dict(graph.tensors), dict(graph.storages)
    for info, storage in (pair for remake in remakes for pair in remake.made):
        tensors[info.name], storages[storage.name] = info, storage
    packs = packs_of(graph, remakes)
    steps: list[Step] = []
    for at, step in enumerate(graph.steps):
        for copy in schedule.before.get(at, ()):
            steps.append(_copied(graph, copy, step, tensors, storages))
        renamed = schedule.reads.get(at, {})
        steps.append(replace(step, reads=tuple(renamed.get(n, n) for n in step.reads)) if renamed else step)
        steps.extend(packs.get(at, {}).values())
    kept = live_steps(steps, graph.outputs)
    return StepGraph(graph.inputs, kept, graph.outputs, tensors, storages)


def packs_of(graph: StepGraph, remakes: Iterable[Remake]) -> dict[int, dict[str, Step]]:
    """Position -> remakes' pack steps by name, to stand right behind it (`packed_behind`): the last one where the value
    is let go once it has been copied, if the copy goes on while other steps run."""
    packs: dict[int, dict[str, Step]] = {}
    for remake in remakes:
        for step in remake.pack:
            last = remake.drained and step is remake.pack[-1]
            first = graph.uses[remake.value][0] if remake.drained else packed_behind(graph, remake)
            at = graph.position[remake.drained] if last else first
            packs.setdefault(at, {}).setdefault(step.name, step)
    return packs


def packed_behind(graph: StepGraph, remake: Remake) -> int:
    """Position of the step behind which a value is packed: its maker; of one that moves in part its last reader in the
    forward of the same program, as what stays of it is copied, which until then would be bytes beside the value."""
    made, *uses = graph.uses[remake.value]
    whole = not any(resource in (DISK, HOST) for resource, _ in remake.takes) or remake.made[0][1].nbytes <= TOKEN
    if whole:
        return made
    mine = program(graph.steps[made].name)
    return max((at for at in uses if at < graph.boundary and program(graph.steps[at].name) == mine), default=made)


def program(step: str) -> str:
    """Which of the graph's programs a step belongs to, by its prefix."""
    return step.partition("/")[0] if "/" in step else ""


def taken(remakes: Iterable[Remake]) -> dict[str, float]:
    """Resource -> what these remakes take of it. A value packed once counts once, however many remakes unpack it."""
    found: dict[str, float] = {}
    for takes in {remake.pack[0].name: remake.takes for remake in remakes if remake.takes}.values():
        for name, amount in takes:
            found[name] = found.get(name, 0.0) + amount
    return found


def _copied(
    graph: StepGraph, copy: Copy, reader: Step, tensors: dict[str, TensorInfo], storages: dict[str, Storage]
) -> Step:
    """Declare the copy's tensors and storages; return its step. A written view lands in its base's new storage."""
    renamed = copy.tensors
    home = {tensors[name].storage: tensors[renamed.get(name, name)].storage for name in copy.step.reads}
    for name in copy.step.writes:
        info: TensorInfo = graph.tensors[name]
        if info.storage not in home:
            home[info.storage] = own = f"{info.storage}@{copy.name}"
            made = storages[info.storage]
            storages[own] = Storage(own, made.nbytes, made.kind)
        tensors[renamed[name]] = TensorInfo(renamed[name], info.shape, info.dtype, home[info.storage], info.stride)
    old = copy.step  # written out: a plan may be simulated a hundred times, and `replace` is three times as slow
    reads, writes = tuple(renamed.get(n, n) for n in old.reads), tuple(renamed[n] for n in old.writes)
    return Step(
        copy.name, old.op, reader.phase, reads, writes, old.source, old.key, old.flops, workspace_again(graph, old),
        old.pure, False, old.fusable, old.fused, old.inlined,
    )  # fmt: skip


def workspace_again(graph: StepGraph, step: Step) -> int:
    """Bytes a copy of the step takes while it runs. A draw made again puts the generator back as it was: besides what
    it took at first it holds that state, as large as the one it starts from, which it reads first."""
    return step.workspace + (graph.bytes_of(step.reads[:1]) if step.advances else 0)


def live_steps(steps: Sequence[Step], outputs: Sequence[str]) -> tuple[Step, ...]:
    """The steps somebody reads, in order: those that write an output, or for a kept step, or have side effects."""
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if not step.pure or step.advances or not step.writes or not wanted.isdisjoint(step.writes):
            wanted.update(step.reads)
            kept.append(step)
    return tuple(reversed(kept))


def added_steps(before: StepGraph, after: StepGraph) -> tuple[Step, ...]:
    """Steps of `after` that `before` does not have: the copies, in order."""
    return tuple(step for step in after.steps if step.name not in before.position)
