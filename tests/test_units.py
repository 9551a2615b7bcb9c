"""Budgets are read exactly, and nonsense is refused with every accepted form."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memopt.units import FACTORS, FORMS, format_seconds, format_size, parse_size, resolve_budget

GIB, CARD = 1024**3, 24 * 1024**3
quiet = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        (" 24 GB ", 24 * 10**9),
        ("512 MiB", 512 * 1024**2),
        ("3KB", 3000),
        ("3KiB", 3072),
        ("7B", 7),
        (".5TB", 5 * 10**11),
        ("2TiB", 2 * 1024**4),
        ("0.1GB", 10**8),  # exact: 0.1 * 10**9 in floats happens to be, 4.35 * 100 is not
        ("4.35KB", 4350),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, 10**6), st.sampled_from(sorted(FACTORS)))
@quiet
def test_a_written_size_is_read_back(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == parse_size(f" {count} {unit}") == count * FACTORS[unit]


@given(st.decimals(min_value="0.001", max_value="9999", places=3), st.sampled_from(["KB", "MiB", "GB", "TiB"]))
@quiet
def test_decimals_lose_less_than_a_byte(number: object, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == math.floor(Fraction(str(number)) * FACTORS[unit])


@given(st.integers(1, 10**15))
@quiet
def test_both_printed_units_name_the_same_size(size: int) -> None:
    decimal, _, binary = format_size(size).rstrip(")").partition(" (")
    assert abs(parse_size(decimal) - size) <= 0.005 * size + 1
    assert not binary or abs(parse_size(binary) - size) <= 0.005 * size + 1


@pytest.mark.parametrize(
    ("spec", "budget"),
    [
        (10**9, 10**9),
        ("80%", CARD * 8 // 10),
        ("100%", CARD),
        ("12.5 %", CARD // 8),
        ("-2GiB", 22 * GIB),
        ("1GB", 10**9),
    ],
)
def test_budgets(spec: int | str, budget: int) -> None:
    assert resolve_budget(spec, capacity=CARD) == budget


def test_auto_leaves_the_stated_reserve_and_never_asks_for_more_than_is_needed() -> None:
    assert resolve_budget("auto", capacity=CARD) == CARD - math.ceil(CARD * Fraction(5, 100))
    assert resolve_budget("auto", capacity=2 * GIB) == 2 * GIB - 512 * 1024**2
    assert resolve_budget("auto", capacity=CARD, needed=GIB) == resolve_budget("auto", capacity=None, needed=GIB) == GIB


@pytest.mark.parametrize("spec", ["80%", "-2GiB", "auto"])
def test_a_share_of_an_unknown_device_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="not known, so name the bytes"):
        resolve_budget(spec, capacity=None)


NONSENSE = [
    "", " ", "24", "24Gb", "24gb", "24 gigabytes", "GB", "1e9B", "0x10B", "nan", "infGB", "1_000B", "1,5GB", "--2GiB",
    "-2", "-80%", "%", "80%%", "Auto", "24GB free", "0GB", "0%", "0.4B", "-24GiB", "-25GiB", "101%", "25GiB", 0, -1,
    CARD + 1, True, 1.5, None, b"24GB", (24,),
]  # fmt: skip


@pytest.mark.parametrize("spec", NONSENSE, ids=repr)
def test_nonsense_is_one_sentence_with_what_was_asked_and_every_form(spec: object) -> None:
    with pytest.raises(ValueError, match="refused") as caught:
        resolve_budget(spec, capacity=CARD)  # type: ignore[arg-type]
    message = str(caught.value)
    assert repr(spec) in message
    assert message.endswith(FORMS)
    assert "\n" not in message


@given(st.text(max_size=12))
@quiet
def test_any_other_text_is_refused_by_both(text: str) -> None:
    assume(not any(mark in text for mark in "0123456789"))
    assume(text.strip() != "auto")
    with pytest.raises(ValueError, match="accepted are"):
        resolve_budget(text, capacity=CARD)
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@given(st.integers(max_value=0))
@quiet
def test_no_bytes_and_fewer_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="accepted are"):
        resolve_budget(size, capacity=None)


def test_bits_and_missing_units_are_named() -> None:
    with pytest.raises(ValueError, match="means bits"):
        parse_size("24Gb")
    with pytest.raises(ValueError, match="unit is missing"):
        resolve_budget("24", capacity=CARD)


def test_sizes_are_printed_in_both_units() -> None:
    assert format_size(24 * 10**9) == "24.00 GB (22.35 GiB)"
    assert format_size(512) == "512 B"
    assert format_size(1000) == "1.00 KB (1000 B)"
    assert format_size(-3 * 10**6) == "-3.00 MB (-2.86 MiB)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (1.234, "1.23 s"), (0.0456, "45.6 ms"), (12.34e-6, "12.3 us"), (5e-9, "5.00 ns"), (125, "2 min 05 s"),
     (99.94, "99.9 s"), (-0.25, "-250 ms"), (119.6, "120 s")],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
