"""What the tests of logits in chunks share: inputs, and chunks so small that there are several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.kernels import logits


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "CHUNK", 0)
    monkeypatch.setattr(logits, "LEAST", 5)
    monkeypatch.setattr(logits, "BLOCK", 10)


def drawn(rows: int, width: int, words: int, biased: bool) -> list[Tensor]:
    """Hidden state, weight and, if asked, bias, in fp64."""
    torch.manual_seed(rows * words)
    made = [torch.randn(rows, width), torch.randn(words, width)] + [torch.randn(words)] * biased
    return [t.double() for t in made]
