"""Markdown that the results' tables are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    made = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([made[0], "|---|" + "--:|" * (len(head) - 1), *made[1:]])


def folded(summary: str, text: str) -> str:
    """What a click opens."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def between(readme: Path, name: str, text: str) -> None:
    """Put the text between the file's markers of that name. ValueError if they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme.name} has no {begin} ... {end}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def sources(rows: Sequence[Mapping[str, Any]], of: str) -> list[str]:
    """What made which rows, by what they are rows of, where they were not all made at once."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if "commit" in row:
            found.setdefault((row["commit"], row["command"]), {})[row[of]] = None
    return [f"{', '.join(names)}: commit {commit}, `{command}`" for (commit, command), names in found.items()]
