"""memopt against its peers on this CPU: `make bench`, or `python -m benchmarks.recompute_cpu --help`.

Every variant runs forward and backward of the same model on the same batch, without an optimizer, which would add the
same bytes and seconds to each. Whole-step peaks (parameters, gradients, activations, temporaries) are measured by
`memopt.runtime.measure`; memopt's budget is the measured peak of the peer it meets. Times are of interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.beds import BEDS
from benchmarks.cpu.picture import draw
from benchmarks.cpu.race import Race
from benchmarks.cpu.summary import HEAD, Row, cells, marks, shown
from benchmarks.peers import FIXED, PEERS
from benchmarks.record import RESULTS, command, surroundings, write_lines
from memopt.lowering import LOWERINGS

DEFAULT = ("llama-small", "gpt2-small", "vit", "resnet-10", "unet")  # small: compiling takes longest
EVERYBODY = {peer.name: peer for peer in (*PEERS, *FIXED)}


def main(words: Sequence[str] | None = None) -> int:
    """Run and write what was asked for. 0 unless no row ran."""
    asked = arguments(words)
    peers = [EVERYBODY[name] for name in met(asked)]
    bisect = not (asked.peer or asked.shares)
    ran = False
    for bed in asked.bed:
        race = Race(bed, lambda line: print(line, file=sys.stderr, flush=True), asked.threads, peers, bisect)
        rows = race.run(asked.rounds, asked.lowering)
        path = asked.results / f"recompute_cpu_{bed}.jsonl"
        typed = command("recompute_cpu", sys.argv[1:] if words is None else words)
        head = {"surroundings": surroundings(asked.threads), "rounds": asked.rounds, "command": typed}
        write_lines(path, [head, *rows])
        draw(rows, BEDS[bed].text, path.with_suffix(".svg"))
        show(rows, BEDS[bed].text)
        ran |= any("error" not in row for row in rows)
    return 0 if ran else 1


def met(asked: argparse.Namespace) -> list[str]:
    """The peers' names in the order of the table: those asked for, with eager, which all are compared with."""
    default = (peer.name for peer in (*PEERS, *(FIXED if asked.shares else ())))
    wanted = {PEERS[0].name, *asked.peer} if asked.peer else {*default}
    return [name for name in EVERYBODY if name in wanted]


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="recompute_cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bed", nargs="+", choices=BEDS, default=DEFAULT, help="models to run")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of timing")
    parser.add_argument("--shares", action="store_true", help="torch's budget at four fixed shares, not bisected")
    parser.add_argument("--peer", nargs="+", choices=EVERYBODY, help="meet eager and these alone, as on rows left open")
    parser.add_argument("--threads", type=int, default=2, help="threads of each variant")
    parser.add_argument("--lowering", choices=LOWERINGS, default="auto", help="memopt's lowering")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    if asked.rounds < 1 or asked.threads < 1:
        parser.error("--rounds and --threads take 1 or more")
    return asked


def show(rows: Sequence[Row], title: str) -> None:
    """The table and the pass marks, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, title=title)
    for row in shown(rows):
        table.add_row(*cells(row, rows))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for mark in marks(rows):
        console.print(f"  {mark.verdict:5}  {mark.text}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
