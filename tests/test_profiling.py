"""Operations are priced as they will run: a convolution under Inductor in channels last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memopt.capture import survey
from memopt.devices import device
from memopt.facts import cost_key
from memopt.profiling import CONVOLUTIONS, measured_costs

IMAGE = 2 * 16 * 64 * 64 * 4  # bytes


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.sin()).square().mean()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is what prefers channels last")
def test_a_convolution_has_the_workspace_of_its_layout() -> None:
    """On contiguous images oneDNN copies what it reads and writes, which the code of Inductor never has it do."""
    inputs = (torch.randn(2, 16, 64, 64, requires_grad=True),)
    program = survey(Convolution(), inputs, {}, lambda program: program, "inductor").captures[0].program
    keys = [cost_key(node) for node in program.graph.nodes if node.target in CONVOLUTIONS]
    assert len(keys) == 2
    eager, inductor = (
        measured_costs([program], device("cpu"), True, lowering).workspaces for lowering in ("eager", "inductor")
    )
    for key in keys:
        assert eager[key] >= IMAGE
        assert inductor.get(key, 0) < IMAGE / 8
