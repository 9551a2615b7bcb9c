"""Which rows there are and in which order. Standard library only: rows run in processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.gpu.beds import TINY, Bed
from memopt.units import resolve_budget

Row = dict[str, Any]
BLOCKS, EVERY_SECOND = "blocks", "every second product"  # as benchmarks/checkpoints.py has them
SHARES = (0.5, 0.2)  # of torch.compile's activation_memory_budget
EAGER, CHECKPOINTED, AGAIN = "eager", "HF checkpointing", "eager, once more"
REFERENCES = (EAGER, CHECKPOINTED)  # whose seconds the others are divided by: the first that fits


@dataclass(frozen=True)
class Job:
    """One row. budget: memopt's, as its doors take it; "smallest" for its floor; "" for a peer. peer: whose peak it is.

    checkpoint, compiled, share: of a peer, as in benchmarks/peers.py. kernels: "liger", "flash-attention" or "".
    offload: what the backward needs goes to pinned host memory. optimizer: a class of torchao's instead of the bed's.
    steps: timed ones, after those that warm up.
    """

    bed: str
    device: str
    name: str = ""
    budget: str = ""
    peer: str = ""
    checkpoint: str = ""
    compiled: bool = False
    share: float | None = None
    kernels: str = ""
    offload: bool = False
    optimizer: str = ""
    lowering: str = ""
    steps: int = 20

    @property
    def needs(self) -> str:
        """The package that only this row needs; "" if none."""
        return {"liger": "liger_kernel", "flash-attention": "flash_attn"}.get(
            self.kernels, "torchao" if self.optimizer else ""
        )

    @property
    def exact(self) -> bool:
        """A peer that computes what eager computes, on the device, with the bed's optimizer: memopt meets it."""
        return not (self.budget or self.kernels or self.offload or self.optimizer or self.name == AGAIN)


def job_of(bed: str, known: Bed, device: str, lowering: str = "") -> Job:
    """What the bed's rows have in common; lowering: memopt's, by default the bed's."""
    return Job(bed, device, lowering=lowering or known.lowering, steps=known.steps)


def plan_of_rows(
    job: Job, bed: Bed, budgets: Sequence[str], shares: Sequence[float], done: Sequence[tuple[Job, Row]]
) -> Iterator[Job]:
    """The rows, most telling first, as time may run out.

    budgets: as memopt's doors take them; shares: of eager's peak, where it fits. done: rows that have run, from which
    further budgets are taken; it grows between two rows.
    """
    peer = replace(job, lowering="")
    yield replace(peer, name=EAGER)
    yield from (within(job, budget) for budget in budgets[:1])
    yield replace(peer, name=CHECKPOINTED, checkpoint=BLOCKS)
    if job.bed != TINY:
        yield replace(peer, name="torch.compile", compiled=True)
        yield replace(peer, name="torch.compile + HF checkpointing", compiled=True, checkpoint=BLOCKS)
    yield from met(job, done)
    yield from (within(job, budget) for budget in budgets[1:])
    yield from (at_share(job, share, row["peak"]) for share in shares for row in peaks(done, EAGER))
    if job.bed != TINY:
        yield from torch_budgets(job, peer, done)
    yield replace(job, name="memopt, smallest", budget="smallest")
    if job.bed != TINY:
        yield from levers(peer, bed)
    yield replace(peer, name=AGAIN)


def within(job: Job, budget: str) -> Job:
    """memopt in a budget of its own."""
    return replace(job, name=f"memopt at {budget}", budget=budget)


def at_share(job: Job, share: float, peak: int) -> Job:
    """memopt in a share of eager's peak, bytes."""
    return replace(job, name=f"memopt at {share:.0%} of eager", budget=str(round(share * peak)))


def peaks(done: Sequence[tuple[Job, Row]], name: str) -> list[Row]:
    """The row of that name, if it ran."""
    return [row for job, row in done if job.name == name and "peak" in row]


def met(job: Job, done: Sequence[tuple[Job, Row]], only: str = "") -> Iterator[Job]:
    """memopt in the peak of each exact peer that ran. only: the peer of that name."""
    for peer, row in list(done):
        if peer.exact and "peak" in row and only in ("", peer.name):
            yield replace(job, name=f"memopt at {peer.name}", budget=str(row["peak"]), peer=peer.name)


def torch_budgets(job: Job, peer: Job, done: Sequence[tuple[Job, Row]]) -> Iterator[Job]:
    """torch.compile's own budgets, each followed by memopt in its bytes."""
    for share in SHARES:
        name = f"torch.compile, budget {share}"
        yield replace(peer, name=name, compiled=True, share=share)
        yield from met(job, done, name)


def levers(peer: Job, bed: Bed) -> Iterator[Job]:
    """Peers that compute something else or elsewhere: shown beside the others, not met in their bytes."""
    if bed.transformer:
        yield replace(peer, name="selective checkpointing", checkpoint=EVERY_SECOND)
    yield replace(peer, name="saved on the host", offload=True)
    if bed.liger:
        yield replace(peer, name="Liger", kernels="liger")
        yield replace(peer, name="Liger + HF checkpointing", kernels="liger", checkpoint=BLOCKS)
    if bed.transformer and bed.dtype == "bf16":
        yield replace(peer, name="flash-attention 2", kernels="flash-attention")
    if bed.optimizer == "adamw":
        for kind in ("AdamW8bit", "AdamW4bit"):
            yield replace(peer, name=f"torchao {kind}", optimizer=kind)
            yield replace(peer, name=f"torchao {kind} + HF checkpointing", optimizer=kind, checkpoint=BLOCKS)


def refused(job: Job, rows: Sequence[Row]) -> Row | None:
    """The row of a budget below one that memopt has refused, which names the floor: another refusal, for the same
    reason, would take minutes of compiling. None for any other job."""
    if not job.budget or job.budget == "smallest":
        return None
    asked = int(job.budget) if job.budget.isdecimal() else resolve_budget(job.budget, capacity=None)
    for row in rows:
        if is_refusal(row) and asked < row["floor"] and row["lowering"] == job.lowering:
            return asdict(job) | {"floor": row["floor"], "surroundings": row["surroundings"]}
    return None


def is_refusal(row: Row) -> bool:
    """memopt found no plan for it."""
    return "floor" in row and "peak" not in row
