"""An optimizer is watched once for a survey and what is derived from it, and anew where its groups changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from memopt import trained
from memopt.capture import survey
from memopt.optim.portions import Update
from memopt.pipeline import prepare


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """How the optimizer was watched to update, each time."""
    times: list[Update] = []
    real = trained.photograph_optimizer

    def counted(*args: Any, **options: Any) -> Any:
        times.append(options["update"])
        return real(*args, **options)

    monkeypatch.setattr(trained, "photograph_optimizer", counted)
    return times


def test_once_for_each_way_to_update(watched: list[Update]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    found = survey(model, (torch.randn(4, 8),), {}, prepare("eager"), "eager", "all")
    first = trained.update_phase(found, optimizer, "cpu")
    assert trained.update_phase(replace(found, chunks=4), optimizer, "cpu") is first
    trained.update_phase(found, optimizer, "cpu", Update(64))
    assert watched == [Update(), Update(64)]
    optimizer.param_groups[0]["amsgrad"] = True
    assert trained.update_phase(found, optimizer, "cpu").state_bytes > first.state_bytes
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    trained.update_phase(found, optimizer, "cpu")
    other = torch.optim.SGD(model.parameters())
    assert trained.update_phase(found, other, "cpu").state_bytes == 0
    assert len(watched) == 5
