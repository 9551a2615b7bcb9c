"""`torch.compile(model, backend="memopt")`: found by its entry point, same numbers, options checked, errors plain."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.backend import memopt_backend
from memopt.kernels.codec import relative_error

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def built() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.GELU())


def gradients(step: Any, model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    step(torch.randn(512, 64)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="memopt", options={"lowering": "eager", **options})


def test_the_entry_point_leads_to_the_backend_and_dynamo_lists_it() -> None:
    found = [entry for entry in entry_points(group="torch_dynamo_backends") if entry.name == "memopt"]
    if not found:
        pytest.skip("memopt is not installed here, only importable")
    assert found[0].load() is memopt_backend
    assert "memopt" in torch._dynamo.list_backends()


def test_the_step_is_bit_identical_under_a_budget_that_binds() -> None:
    model = built()
    want = gradients(model, model)
    with pytest.raises(memopt.BudgetError) as caught:  # the floor, found out
        compiled(built(), budget="10KB")(torch.randn(512, 64))
    twin = built()
    got = gradients(compiled(twin, budget=caught.value.floor_bytes), twin)
    assert len(got) == len(want) == 4
    assert all(map(torch.equal, want, got))


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_each_shape_gets_a_plan(lowering: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Dynamo would trace symbolic sizes, after the second shape or at once, bytes are planned for real ones."""
    peaks: list[int] = []
    monkeypatch.setattr("memopt.planning.plan_made", lambda text, plan: peaks.append(plan()["predicted"]["peak_bytes"]))
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    options = {"lowering": lowering, "budget": "1GB"}
    step = torch.compile(model, backend="memopt", dynamic=dynamic, options=options)
    for shape in ((4, 16), (4, 12), (6, 12)):
        x = torch.randn(*shape, 8)
        got, want = (torch.autograd.grad(run(x).square().sum(), list(model.parameters())) for run in (step, model))
        torch.testing.assert_close(got, want)
    assert len(set(peaks)) == 3


def test_a_refusal_arrives_as_itself_with_its_figures() -> None:
    relative_error.cache_clear()  # found out anew, while Dynamo traces
    with pytest.raises(memopt.BudgetError, match="the least this step can run in") as caught:
        compiled(built(), budget="10KB")(torch.randn(512, 64))
    assert caught.value.budget_bytes == 10_000
    assert caught.value.floor_bytes > 10_000
    assert caught.value.ways_out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"options": {"bugdet": "1GB"}}, "'bugdet' is not known; known are budget, numerics, lowering"),
        ({"mode": "max-autotune"}, "mode='max-autotune' is not known"),
        ({"options": {"budget": "24Gb"}}, "a small b means bits"),
        ({"options": {"budget": "1GB", "optimizer": "lion"}}, "optimizer='lion' is not known; known are adamw, none"),
        ({"options": {"budget": "1GB", "lowering": "xla"}}, "lowering='xla' is not known; known are auto, inductor"),
        ({"options": {"budget": "1GB", "accumulate": 0}}, "accumulate=0 refused"),
    ],
)
def test_what_it_does_not_know_is_one_value_error(given: dict[str, Any], says: str) -> None:
    model = built()
    with pytest.raises(ValueError, match=says):
        torch.compile(model, backend="memopt", **given)(torch.randn(8, 64))


def test_torch_logs_may_name_memopt() -> None:
    code = "import torch, logging; print(logging.getLogger('memopt').getEffectiveLevel() <= logging.DEBUG)"
    environment = {**os.environ, "TORCH_LOGS": "+memopt", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.strip() == "True"


def test_the_plan_is_a_torch_trace_artifact(tmp_path: Path) -> None:
    code = (
        "import torch; from torch import nn; m = nn.Linear(8, 8)\n"
        "torch.compile(m, backend='memopt', options={'budget': '1GB', 'lowering': 'eager'})(torch.randn(4, 8))"
    )
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    logs = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert '"name": "memopt_plan"' in logs
    assert '"budget_bytes": 1000000000' in logs
