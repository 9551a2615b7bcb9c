"""What the backward alone reads, and what is made of fewer bytes than it takes, is made where it is read.

Inductor's max pooling makes offsets inside the window (int8), and of those the indices (int64) that the backward is
given (torch/_inductor/decomposition.py, max_pool2d_with_indices). Made in the forward, where tracing put them, the
indices are held until then, eight times the bytes; torch's own partitioner makes them again in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from memopt.facts import facts, is_getitem, storage_bytes
from memopt.passbase import Cleanup, Numerics, PassResult
from memopt.places import edited
from memopt.program import FORWARD, Program, boundary, changing

Place = tuple[int, int]


def late_values(program: Program) -> PassResult:
    """Move such nodes right before their first reader, the last of a chain first."""
    return edited(program, _sites, _moved)


def _sites(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Such nodes, and the first reader of each."""
    first, overwritten = boundary(program), set(changing(program))
    place: dict[fx.Node, Place] = {node: (at, 0) for at, node in enumerate(program.graph.nodes)}
    begin = place[first] if first is not None else (0, 0)
    found = []
    for node in reversed(program.graph.nodes):
        if place[node] < begin and _late(node, place, begin) and _gains(node, overwritten):
            reader = min(node.users, key=place.__getitem__)
            place[node] = place[reader][0], place[reader][1] - 1
            found.append((node, reader))
    return found


def _moved(program: Program, sites: list[tuple[fx.Node, fx.Node]]) -> None:
    for node, reader in sites:
        reader.prepend(node)
        node.meta["partitioner_tag"] = "is_backward"


def _late(node: fx.Node, place: dict[fx.Node, Place], first: Place) -> bool:
    """Whether it computes one tensor, and nobody in the forward wants it."""
    if node.op != "call_function" or is_getitem(node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    known = facts(node)
    plain = known.pure and not known.random and known.made[0] is not None and known.made[0].home is None
    wanted = node.meta.get("partitioner_tag") == FORWARD
    readers = [user for user in node.users if user.op != "output"]
    return plain and not wanted and len(readers) == len(node.users) > 0 and all(place[r] >= first for r in readers)


def _gains(node: fx.Node, overwritten: set[fx.Node]) -> bool:
    """Whether what it is made of takes fewer bytes; parameters and inputs are there anyway."""
    read = (arg.meta.get("val") for arg in node.all_input_nodes if arg.op != "placeholder")
    homes = {value.untyped_storage()._cdata: storage_bytes(value) for value in read if isinstance(value, Tensor)}
    needed = sum(homes.values())
    return needed < storage_bytes(node.meta["val"]) and overwritten.isdisjoint(node.all_input_nodes)


@dataclass(frozen=True)
class LateValues(Cleanup):
    """Let no value be held for the backward that can be made there of fewer bytes. Assumes: nothing; it is made once,
    of the same values."""

    name, numerics, run = "late_values", Numerics.EXACT, staticmethod(late_values)
