"""Conditions that hold where a value is wanted, and what they differ along."""

from __future__ import annotations

from collections.abc import Sequence

from memopt.kernels.emit.indices import Index

Masks = tuple[tuple[str, frozenset[str]], ...]


def every(conditions: Sequence[str]) -> str:
    """That all of these hold, in Triton's words."""
    return conditions[0] if len(conditions) == 1 else " & ".join(f"({each})" for each in conditions)


def within(index: Index, first: int, end: int | None) -> Masks:
    """That an index lies from first to before end."""
    along, place = frozenset(index.variables()), index.text()
    found = [f"{place} >= {first}"] if first else []
    return tuple((text, along) for text in (*found, *([] if end is None else [f"{place} < {end}"])))
