"""A step graph as JSON and back, with the seconds of each step and the block its allocator rounds to. No torch.

{"schema": 1, "name", "about", "device", "block", "inputs": [...], "outputs": [...],
 "steps": [{"name", "op", "phase", "reads", "writes", "seconds", "workspace", "pure", "advances", "key"}],
 "tensors": {name: storage},                      # the alias class
 "storages": {name: [bytes, kind]},
 "partitions": [{"share", "forward", "backward"}],  # torch's own, by step names; see partition.py
 "notes": [...]}
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify

SCHEMA = 1


@dataclass(frozen=True)
class Partition:
    """What torch's partitioner makes of a share of the saved bytes: steps of the two halves, in the order they run.

    seconds: the partitioner took.
    """

    share: float
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Work:
    """What every planner is given. seconds: of each step, by name. block: bytes an allocation is rounded up to.

    notes: what could not be exported, said in the table.
    """

    name: str
    about: str
    device: str
    graph: StepGraph
    seconds: Mapping[str, float]
    block: int = 1
    partitions: tuple[Partition, ...] = ()
    notes: tuple[str, ...] = ()


def to_json(work: Work) -> dict[str, Any]:
    """The work as plain values. Shapes and dtypes stay behind: seconds and bytes have been made of them."""
    graph = work.graph
    return {
        "schema": SCHEMA,
        "name": work.name,
        "about": work.about,
        "device": work.device,
        "block": work.block,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "steps": [step_to_json(step, work.seconds.get(step.name, 0.0)) for step in graph.steps],
        "tensors": {name: info.storage for name, info in graph.tensors.items()},
        "storages": {name: [storage.nbytes, storage.kind] for name, storage in graph.storages.items()},
        "partitions": [vars(part) for part in work.partitions],
        "notes": list(work.notes),
    }


def step_to_json(step: Step, seconds: float) -> dict[str, Any]:
    """One step; what a step usually is (pure, no workspace, not a draw) is left out."""
    out: dict[str, Any] = {"name": step.name, "op": step.op, "phase": step.phase, "key": step.key}
    out |= {"reads": list(step.reads), "writes": list(step.writes), "seconds": seconds}
    out |= {"workspace": step.workspace} if step.workspace else {}
    return out | ({} if step.pure else {"pure": False}) | ({"advances": True} if step.advances else {})


def from_json(data: Mapping[str, Any]) -> Work:
    """What `to_json` made. ValueError for another schema, VerifyError for a graph that is not well formed."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"this file has schema {data.get('schema')!r}; this version reads {SCHEMA}")
    graph = StepGraph(
        tuple(data["inputs"]),
        tuple(step_from_json(step) for step in data["steps"]),
        tuple(data["outputs"]),
        {name: TensorInfo(name, (), "", storage) for name, storage in data["tensors"].items()},
        {name: Storage(name, nbytes, kind) for name, (nbytes, kind) in data["storages"].items()},
    )
    seconds = {step["name"]: float(step["seconds"]) for step in data["steps"]}
    parts = tuple(
        Partition(p["share"], tuple(p["forward"]), tuple(p["backward"]), p["seconds"]) for p in data["partitions"]
    )
    words = (data["name"], data["about"], data["device"])
    return Work(*words, verify(graph), seconds, data["block"], parts, tuple(data["notes"]))


def step_from_json(data: Mapping[str, Any]) -> Step:
    """One step."""
    return Step(
        data["name"], data["op"], data["phase"], tuple(data["reads"]), tuple(data["writes"]), "", data["key"], 0,
        data.get("workspace", 0), data.get("pure", True), data.get("advances", False),
    )  # fmt: skip


def save(work: Work, path: Path) -> None:
    """Write the work, compressed; the same work gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(work), separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(text, mtime=0))


def load(path: Path) -> Work:
    """Read what `save` wrote."""
    return from_json(json.loads(gzip.decompress(path.read_bytes())))
