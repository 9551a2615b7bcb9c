"""Bytes and seconds as people write them: budgets read exactly, sizes printed in both units.

"GB" is 10^9 bytes and "GiB" 2^30 (IEC 80000-13); "Gb" would be bits and is refused rather than guessed at.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

DECIMAL = ("B", "KB", "MB", "GB", "TB")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
FACTORS = {unit: 1000**power for power, unit in enumerate(DECIMAL)}
FACTORS |= {unit: 1024**power for power, unit in enumerate(BINARY)}

# What "auto" leaves to the CUDA context, libraries' handles and other programs: the larger of the two.
AUTO_SHARE, AUTO_LEAST = Fraction(5, 100), 512 * 1024**2

NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
SIZE = re.compile(rf"{NUMBER}\s*([KMGT]i?B|B)")
PERCENT = re.compile(rf"{NUMBER}\s*%")
FORMS = (
    'bytes as an int, "24GB" (10^9), "24GiB" (2^30; B, KB, KiB, MB, MiB, TB and TiB alike), '
    '"80%" of the device, "-2GiB" (leave that much free), or "auto"'
)


def parse_size(text: str) -> int:
    """Bytes in a size with a unit, rounded down: "1.5GiB" is 1610612736. ValueError for anything else and for zero."""
    size = _size(text)
    if size is None or size < 1:
        why = f"is not a size{_hint(text)}" if size is None else "is not even one byte"
        raise ValueError(f"{text!r} {why}; sizes are written like 24GB (10^9) or 1.5GiB (2^30)")
    return size


def _size(text: object) -> int | None:
    found = SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    return None if found is None else math.floor(Fraction(found[1]) * FACTORS[found[2]])


def resolve_budget(spec: int | str, *, capacity: int | None, needed: int | None = None) -> int:
    """Bytes the whole step may take.

    capacity: the device's memory, bytes; None if it is unknown, and then "80%" and "-2GiB" are refused.
    needed: what the step takes without memopt, bytes; "auto" never asks for more, as it would buy nothing.
    "auto" is the capacity less 5 % of it or 512 MiB, whichever is more.
    ValueError, naming every accepted form, for nonsense, for nothing left, and for more than the device has.
    """
    written = isinstance(spec, bool) or not isinstance(spec, int)  # True is an int to Python, and no budget
    budget = _from_text(spec, capacity, needed) if written else int(spec)
    if budget < 1:
        raise _refused(spec, f"it leaves {budget:,} bytes")
    if capacity is not None and budget > capacity:
        raise _refused(spec, f"that is {format_size(budget)} of a device that has {format_size(capacity)}")
    return budget


def _from_text(spec: object, capacity: int | None, needed: int | None) -> int:
    text = spec.strip() if isinstance(spec, str) else ""
    if text == "auto":
        return _auto(spec, capacity, needed)
    if percent := PERCENT.fullmatch(text):
        return math.floor(Fraction(percent[1]) * _known(spec, capacity) / 100)
    if text.startswith("-") and (left := _size(text[1:])):
        return _known(spec, capacity) - left
    if (size := _size(text)) is not None:
        return size
    raise _refused(spec, f"that is no amount of memory{_hint(spec)}")


def _auto(spec: object, capacity: int | None, needed: int | None) -> int:
    if capacity is None and needed is not None:
        return needed
    whole = _known(spec, capacity)
    free = whole - max(math.ceil(whole * AUTO_SHARE), AUTO_LEAST)
    return free if needed is None else min(free, needed)


def _known(spec: object, capacity: int | None) -> int:
    if capacity is None:
        raise _refused(spec, "the device's memory is not known, so name the bytes")
    return capacity


def _refused(spec: object, why: str) -> ValueError:
    return ValueError(f"budget {spec!r} refused: {why}; accepted are {FORMS}")


def _hint(spec: object) -> str:
    """What was probably meant, for the mistakes people make most."""
    text = spec.strip() if isinstance(spec, str) else ""
    if re.fullmatch(rf"{NUMBER}\s*[KMGTkmgt]?i?b", text):
        return " (a small b means bits; bytes are written with B)"
    if re.fullmatch(NUMBER, text):
        return " (a unit is missing)"
    return ""


def format_size(nbytes: int) -> str:
    """Both units: "24.00 GB (22.35 GiB)"; below 1,000 bytes just "512 B"."""
    size = abs(nbytes)
    if size < 1000:
        return f"{nbytes} B"
    sign = "-" if nbytes < 0 else ""
    return f"{sign}{_scaled(size, DECIMAL, 1000)} ({sign}{_scaled(size, BINARY, 1024)})"


def _scaled(size: int, units: tuple[str, ...], base: int) -> str:
    power = next((p for p in range(len(units) - 1) if size < base ** (p + 1)), len(units) - 1)
    return f"{size / base**power:.2f} {units[power]}" if power else f"{size} B"


def format_seconds(seconds: float) -> str:
    """Three figures and a unit: "1.23 s", "45.6 ms", "12.3 us"; from two minutes on "2 min 05 s"."""
    if abs(seconds) >= 120:
        whole = round(abs(seconds))
        return f"{'-' if seconds < 0 else ''}{whole // 60} min {whole % 60:02d} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * scale >= 1:
            return f"{_three(seconds * scale)} {unit}"
    return f"{_three(seconds * 1e9)} ns" if seconds else "0 s"


def _three(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(max(abs(value), 1.0))))
    return f"{value:.{digits}f}"
