"""The sizes tried for a way out: the largest that fits is found from few captures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from memopt.errors import WayOut
from memopt.smaller import CAPTURES, Tried, cut, largest_fitting, shared_size, sizes_below


def found(size: int, dim: int, budget: int, peak: Callable[[int], int]) -> tuple[str | None, list[int]]:
    """The size chosen for a step whose least peak is peak(size), and the sizes planned."""
    asked: list[int] = []

    def plan_at(at: int) -> Tried:
        asked.append(at)
        return Tried(at, peak(at), WayOut(str(at), peak(at), fits=peak(at) <= budget))

    way = largest_fitting(plan_at, sizes_below(size, dim), size, peak(size), budget)
    return (way.change if way else None), asked


@pytest.mark.parametrize("size", [2, 7, 9, 12, 16, 30, 64, 96])
@pytest.mark.parametrize("dim", [0, 1])
def test_of_an_affine_peak_the_largest_size_that_fits_is_found(size: int, dim: int) -> None:
    for budget in range(110, 100 + 10 * size, 10):
        best = max(at for at in sizes_below(size, dim) if 100 + 10 * at <= budget)
        chosen, asked = found(size, dim, budget, lambda at: 100 + 10 * at)
        assert chosen == str(best), (budget, asked)
        assert len(asked) <= CAPTURES


def test_what_cannot_fit_is_shown_at_its_smallest() -> None:
    assert found(16, 0, 50, lambda at: 100 + 10 * at)[0] == "1"


def test_a_curved_peak_leads_to_a_size_that_fits() -> None:
    chosen, _ = found(64, 1, 2000, lambda at: 500 + at * at)
    assert chosen is not None
    assert 30 <= int(chosen) <= 38  # 38 * 38 is the most


def test_a_model_that_takes_no_other_size_has_no_way_out() -> None:
    assert largest_fitting(lambda _: None, [1, 2, 4], 8, 100, 50) is None


def test_odd_sizes_have_ways_out_too() -> None:
    call = ((torch.zeros(9, 5, dtype=torch.long),), {"labels": torch.zeros(9, 5, dtype=torch.long)})
    assert (shared_size(call, 0), shared_size(call, 1)) == (9, 5)
    assert list(sizes_below(9, 0)) == [1, 3]
    assert cut(call, 1, 3)[1]["labels"].shape == (9, 3)
    assert shared_size(((torch.zeros(1, 5),), {}), 0) is None
