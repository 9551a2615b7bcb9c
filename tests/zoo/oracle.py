"""What a compiled step really holds after each of its operations, against what the plan says it holds.

The ledger keeps a weak reference to every storage it ever saw: what counts is what is alive in the process, whoever
holds it (the running graph, autograd between forward and backward, the caller, an optimizer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from memopt import lowering
from memopt.graph import TANGENTS, StepGraph
from memopt.joints import ADD, LEAVE, RECEIVE
from memopt.program import WRITE_BACK
from memopt.runtime.executor import Executor
from memopt.timeline import live_after


@dataclass
class Ledger:
    """held: (step, bytes alive after it) in the order the steps ran, while `on`."""

    held: list[tuple[str, int]] = field(default_factory=list)
    on: bool = False
    constants: list[Any] = field(default_factory=list)  # of the graphs: tensors the user's code made while traced
    known: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def register(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, (tuple, list)):
                self.register(tensor)
            elif isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def probe(self, step: str, live: Sequence[Any]) -> None:
        if self.on:
            self.register(live)
            if step:  # else the arguments, before the first: the loss's gradient may be let go by the first step
                self.held.append((step, self.alive()))

    def alive(self) -> int:
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        return sum(size for _, size in self.known.values())


@contextmanager
def probed() -> Iterator[Ledger]:
    """Every graph the eager lowering makes meanwhile reports to the ledger."""
    ledger = Ledger()

    class Watched(Executor):
        def __init__(self, module: fx.GraphModule) -> None:
            super().__init__(module, ledger.probe)

        def __call__(self, args: list[Any]) -> Any:
            if not any(isinstance(arg, FakeTensor) for arg in args):  # a survey's graphs have constants of their own
                ledger.constants += self.constants.values()
            return super().__call__(args)

    with patch.object(lowering, "Executor", Watched):
        yield ledger


def predicted(graph: StepGraph) -> list[tuple[str, int]]:
    """(step, bytes alive after it) as the plan says; what only the plan knows as steps is left out."""
    after = zip(graph.steps, live_after(graph), strict=True)
    return [
        (plain(step.name), held) for step, held in after if step.phase != "optimizer" and not planned_only(step.name)
    ]


def plain(step: str) -> str:
    """The step's name without the mark of its graph ('g1/mm' -> 'mm')."""
    return step.rpartition("/")[2]


def planned_only(step: str) -> bool:
    return plain(step) in (TANGENTS, WRITE_BACK, RECEIVE, LEAVE, ADD, "return", "accumulate", "let_go")
