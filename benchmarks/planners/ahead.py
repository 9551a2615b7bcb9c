"""The works as they get ready: captured by a process of its own while the first one plans."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from benchmarks.planners.export import Work, load, save
from benchmarks.planners.graphs import captured


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def exported(name: str, folder: Path) -> Path:
    """The graph's file, captured if it is not there."""
    path = folder / f"{name}.json.gz"
    if not path.exists():
        save(captured(name, tell), path)
    return path


def works(names: Sequence[str], folder: Path, until: float) -> Iterator[Work]:
    """The works as they are ready; captured ahead in a process of its own. Those not ready in time are named."""
    missing = [name for name in names if not (folder / f"{name}.json.gz").exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        ahead: dict[str, Future[Path]] = {name: pool.submit(exported, name, folder) for name in missing}
        for name in names:
            if name in ahead and not finished(ahead[name], until):
                tell(f"{name}: left out, no time to capture it")
                ahead[name].cancel()
                continue
            yield load(folder / f"{name}.json.gz")


def finished(job: Future[Path], until: float) -> bool:
    """Whether the job ended in time. Raises what it raised."""
    try:
        job.result(max(0.0, until - time.monotonic()))
    except TimeoutError:
        return False
    return True
