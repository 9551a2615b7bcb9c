"""Measured costs kept between runs: one JSON file for each version of torch and memopt, device and thread count."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch

import memopt
from memopt.files import write_atomic

logger = logging.getLogger("memopt")

SCHEMA = 2  # 1: medians of three runs, up to a thousand times too long when made on a busy machine
Entry = tuple[float, int, int]  # seconds, workspace bytes, output bytes


def cache_dir() -> Path:
    """MEMOPT_CACHE_DIR, by default ~/.cache/memopt."""
    return Path(os.environ.get("MEMOPT_CACHE_DIR") or Path.home() / ".cache" / "memopt")


def device_name(device: torch.device) -> str:
    """What distinguishes this device's speed: the GPU's name; the processor's, with torch's thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def cache_file(device: torch.device) -> Path:
    """Where costs are kept that this torch, and this memopt, which has operations of its own, had on this device."""
    versions = f"{torch.__version__} memopt {memopt.__version__}"
    slug = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{versions} {device_name(device)}").strip("-")
    return cache_dir() / "opcosts" / f"{slug}.json"


def load(path: Path) -> dict[str, Entry]:
    """The entries of a cache file; none, with a warning, if it is damaged."""
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("memopt: ignoring the damaged cost cache %s (%s); it will be written anew", path, error)
        return {}


def _parsed(document: dict[str, object]) -> dict[str, Entry]:
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']}, not {SCHEMA}")
    costs = document["costs"]
    if not isinstance(costs, Mapping):
        raise TypeError("costs is no object")
    return {str(key): (float(s), int(workspace), int(out)) for key, (s, workspace, out) in costs.items()}


def save(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write the entries over those on disk, whole or not at all: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    costs = {**(load(path) if path.exists() else {}), **entries}
    write_atomic(path, json.dumps({"schema": SCHEMA, "costs": dict(sorted(costs.items()))}))
