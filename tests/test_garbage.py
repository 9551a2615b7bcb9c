"""The collector rests while a graph is captured or planned, and is as it was afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memopt.api import make_request
from memopt.capture import survey
from memopt.devices import device
from memopt.errors import CaptureError
from memopt.garbage import collected_later
from memopt.pipeline import Costs, make_plan
from memopt.program import Program
from memopt.seams import parts_of


@pytest.fixture(autouse=True)
def _collecting() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("was", [True, False])
def test_the_collector_is_as_it_was(was: bool) -> None:
    (gc.enable if was else gc.disable)()
    with collected_later(), collected_later():
        assert not gc.isenabled()
    assert gc.isenabled() == was
    with pytest.raises(ValueError, match="inside"), collected_later():
        raise ValueError("inside")
    assert gc.isenabled() == was


def test_it_rests_while_a_model_is_captured_and_planned_and_not_after_an_error() -> None:
    seen: list[bool] = []

    def prepare(program: Program) -> Program:
        seen.append(gc.isenabled())
        return program

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    found = survey(model, (torch.zeros(2, 4),), {}, prepare, gradients="all")
    assert seen == [False]
    assert gc.isenabled()
    with pytest.raises(CaptureError):
        survey(model, (torch.zeros(2, 5),), {}, prepare)
    assert gc.isenabled()
    request = make_request(device("cpu"), "1GB", None, (), "exact", "eager", "", 1, "model")
    make_plan(found, request, Costs(), 0.0, lambda stage, fraction: seen.append(gc.isenabled()))
    assert not any(seen)
    assert len(seen) > 1
    assert gc.isenabled()
    assert parts_of(found) is parts_of(found)
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None  # though what was derived from it is kept
