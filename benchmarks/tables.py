"""Every table of the README and its pictures, from the results: `make bench-table`, or `python -m benchmarks.tables`.

Each tier stands between markers of its own; one without results leaves what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import picture as frontier_picture
from benchmarks.beds import BEDS
from benchmarks.cpu import picture as cpu_picture
from benchmarks.cpu.summary import markdown, promised
from benchmarks.frontier.__main__ import AXES, panels
from benchmarks.frontier.table import summary as frontiers
from benchmarks.gpu import table as gpu
from benchmarks.gpu.beds import BEDS as GPU_BEDS
from benchmarks.markdown import between, folded
from benchmarks.optimizers.__main__ import COLOURS
from benchmarks.optimizers.table import summary as optimizers
from benchmarks.planners import picture as planner_picture
from benchmarks.planners.summary import summary
from benchmarks.record import RESULTS, ROOT, made, read_lines
from benchmarks.training import picture as training_picture
from benchmarks.training.table import summary as qualities

Line = dict[str, Any]
PICTURES = "benchmarks/results"  # as the README sees them


def main(words: Sequence[str] | None = None) -> int:
    """Put the tables in. 0 unless there are no results at all."""
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file with the markers")
    asked = parser.parse_args(words)
    insert(asked.readme, asked.results)
    return 0


def insert(readme: Path, results: Path) -> None:
    """Replace what stands between the markers of each tier that has results, and draw their pictures anew.

    ValueError if there are no results, or markers are missing.
    """
    found = {name: text for name, make in TIERS.items() if (text := "\n\n".join(make(results)))}
    if not found:
        raise ValueError(f"no results in {results.name}: run make bench first")
    for name, text in found.items():
        between(readme, name, text)


def source(head: Line, fallback: str) -> str:
    """The caption under a title: date, versions, machine, commit, command. fallback: for results that do not say."""
    return f"{made(head['surroundings'])}; `{head.get('command', fallback)}`"


def executed(results: Path) -> Iterator[str]:
    """The executed tier on the CPU: a part for each bed with results, all but the first folded."""
    for place, (path, text) in enumerate(existing(results, "recompute_cpu", {n: b.text for n, b in BEDS.items()})):
        head, *rows = read_lines(path)
        cpu_picture.draw(rows, text, path.with_suffix(".svg"))
        fallback = f"python -m benchmarks.recompute_cpu --bed {path.stem.removeprefix('recompute_cpu_')}"
        parts = [f"{text} ({source(head, fallback)}; {head['rounds']} rounds):", markdown(rows), shown(path)]
        parts.append(folded("promised and measured", promised(rows)))
        whole = "\n\n".join(part for part in parts if part)
        yield folded(text, whole) if place else whole


def planned(results: Path) -> Iterator[str]:
    """The planner tier."""
    path = results / "planners.jsonl"
    if not path.exists():
        return
    head, *lines = read_lines(path)
    heads = [line for line in lines if "planner" not in line]
    rows = [line for line in lines if "planner" in line]
    planner_picture.picture(heads, rows, path.with_suffix(".svg"))
    where = source(head, "python -m benchmarks.planners")
    yield f"Planners on the same step graphs, scored by one simulator ({where}):"
    yield summary(rows)
    if picture := shown(path):
        yield picture


def on_gpu(results: Path) -> Iterator[str]:
    """The executed tier on a GPU: a part for each bed with results, folded."""
    for path, text in existing(results, "gpu", {name: bed.text for name, bed in GPU_BEDS.items()}):
        head, *rows = read_lines(path)
        gpu.draw(rows, text, path.with_suffix(".svg"))
        where = "; ".join(dict.fromkeys(made(row["surroundings"]) for row in rows if "surroundings" in row))
        parts = [f"{where}; `{head['command']}`", gpu.markdown(rows), shown(path)]
        yield folded(text, "\n\n".join(part for part in parts if part))


def existing(results: Path, prefix: str, texts: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """The result files that are there, with the text of their bed."""
    for name, text in texts.items():
        if (path := results / f"{prefix}_{name}.jsonl").exists():
            yield path, text


def shown(path: Path) -> str:
    """The picture beside a file of results; "" if there is none."""
    picture = path.with_suffix(".svg")
    return f"![step time over peak]({PICTURES}/{picture.name})" if picture.exists() else ""


def levers(results: Path) -> Iterator[str]:
    """All levers together against each alone."""
    path = results / "frontier.jsonl"
    if path.exists():
        head, *rows = read_lines(path)
        frontier_picture.draw(panels(rows), path.with_suffix(".svg"), *AXES)
        where = source(head, "python -m benchmarks.frontier")
        yield folded("every lever alone, and all together", f"({where})\n\n{frontiers(rows)}\n\n{shown(path)}")


def trained(results: Path) -> Iterator[str]:
    """Quality after training with exact and lossy plans."""
    path = results / "training.jsonl"
    if path.exists():
        head, *rows = read_lines(path)
        training_picture.draw(rows, path.with_suffix(".svg"))
        where = source(head, "python -m benchmarks.training")
        text = f"({where}; a lossy plan uses its lever alone, as much of it as there can be)\n\n{qualities(rows)}"
        yield folded("quality after training", f"{text}\n\n![loss curves]({PICTURES}/{path.stem}.svg)")


def updated(results: Path) -> Iterator[str]:
    """Quality after training with each optimizer."""
    path = results / "optimizers.jsonl"
    if path.exists():
        head, *rows = read_lines(path)
        training_picture.draw(rows, path.with_suffix(".svg"), COLOURS)
        where = source(head, "python -m benchmarks.optimizers")
        text = f"({where}; each at the rate that trained best on another seed)\n\n{optimizers(rows)}"
        yield folded("optimizers beside AdamW", f"{text}\n\n![loss curves]({PICTURES}/{path.stem}.svg)")


TIERS: Mapping[str, Callable[[Path], Iterator[str]]] = {
    "bench": executed, "planners": planned, "levers": levers, "training": trained, "optimizers": updated,
    "gpu": on_gpu,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
