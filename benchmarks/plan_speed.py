"""How planning time and memory grow with depth: one fresh process per depth, a Markdown table on stdout.

    python benchmarks/plan_speed.py    # Llama-3-8B's layer, 8 to 80 times
    python benchmarks/plan_speed.py --preset llama-3-70b --layers 80

Each process captures the step under fake tensors, asks for its floor (a budget of one byte), then plans it within a
budget `--share` of the way from the floor to the unconstrained peak, so that the planner has to choose. The device is
one of the catalogue with as much memory as asked: only its rates matter here.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memopt.presets import PRESETS

LAYERS = (8, 16, 32, 64, 80)


@dataclass(frozen=True)
class Row:
    """One depth. Seconds: start (imports), build (model on fake tensors), capture, floor (to say that one byte is not
    enough), plan, total (without the floor), cpu (of the process, all of it; a busy machine stretches it less).
    Bytes: the rest but steps, layers, gap."""

    layers: int
    steps: int
    start: float
    build: float
    capture: float
    floor: float
    plan: float
    total: float
    cpu: float
    budget: int
    peak: int
    unconstrained: int
    status: str
    gap: float
    resident: int


def measure(preset: str, layers: int, batch: int, seq: int, device: str, lowering: str, share: float) -> Row:
    """Plan the preset at this depth, in this process. resident is the process's peak so far, bytes."""
    began = time.perf_counter()
    from memopt.api import make_request
    from memopt.capture import survey
    from memopt.devices import device as known
    from memopt.models import load
    from memopt.pipeline import Costs, make_plan, prepare, silent
    from memopt.workbench import bench

    with tempfile.TemporaryDirectory() as folder:
        made = bench(load(str(written(preset, layers, Path(folder)))), batch, seq, "bf16", "adamw", device)
        imported = time.perf_counter()
        model, inputs = made.build_fake()
    built = time.perf_counter()
    target = replace(known(device), memory=1 << 50)
    request = make_request(target, 1, made.optimizer_over(model), (), "reordered", lowering, "", 1, preset)
    found = survey(model, (), inputs, prepare(request.lowering), request.lowering, rewrites=request.rewrites)
    captured = time.perf_counter()
    free = make_plan(found, request, Costs(), captured - built, silent).result
    again = time.perf_counter()
    request = replace(request, budget=free.plan.floor + round(share * (free.baseline_peak - free.plan.floor)))
    result = make_plan(found, request, Costs(), captured - built, silent).result
    done = time.perf_counter()
    return Row(
        layers, len(free.before.steps), imported - began, built - imported, captured - built, again - captured,
        done - again, done - began - (again - captured), time.process_time(), request.budget, result.peak,
        free.baseline_peak, result.plan.status.value, result.plan.gap,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip


def written(preset: str, layers: int, folder: Path) -> Path:
    """The preset's configuration at another depth, as the file `memopt plan` takes."""
    known = PRESETS[preset]
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": known.model_type, **known.config, "num_hidden_layers": layers}))
    return path


def fresh(options: argparse.Namespace, layers: int) -> Row:
    """`measure` in a process of its own, so that its memory peak is that depth's alone."""
    command = [sys.executable, __file__, "--one", str(layers)]
    for name in ("preset", "batch", "seq", "device", "lowering", "share"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


HEAD = (
    "| layers | steps | capture s | s/layer | floor s | plan s | in all s | cpu s | budget GB | peak GB | free GB | "
    "status | gap | resident GB |\n" + "|--:" * 11 + "|---|--:|--:|"
)


def line(row: Row) -> str:
    """The row in Markdown; bytes in GB (10^9)."""
    sizes = " | ".join(f"{size / 1e9:.2f}" for size in (row.budget, row.peak, row.unconstrained))
    return (
        f"| {row.layers} | {row.steps} | {row.capture:.1f} | {row.capture / row.layers:.2f} | "
        f"{row.floor:.1f} | {row.plan:.1f} | {row.total:.1f} | {row.cpu:.1f} | {sizes} | {row.status} | "
        f"{row.gap:.2%} | {row.resident / 1e9:.2f} |"
    )


def arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="llama-3-8b", choices=[n for n, p in PRESETS.items() if "llama" in n])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--device", default="h200")
    parser.add_argument("--lowering", default="eager", choices=("eager", "inductor", "auto"))
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """One depth as JSON (--one), or each depth in a fresh process as a table."""
    options = arguments()
    if options.one is not None:
        given = (options.batch, options.seq, options.device, options.lowering, options.share)
        print(json.dumps(asdict(measure(options.preset, options.one, *given))))
        return
    print(HEAD, flush=True)
    for layers in options.layers:
        print(line(fresh(options, layers)), flush=True)


if __name__ == "__main__":
    main()
