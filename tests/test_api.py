"""`memopt.compile` and `memopt.plan` at work: the module stays itself, the promise is the fact, the switches switch."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.models import load
from memopt.report import PlanResult
from memopt.runtime.measure import measure_step

ROWS = 512


class Classifier(nn.Module):
    """An MLP with dropout and its loss: 84,488 parameters; activations dominate."""

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8)]
        self.net = nn.Sequential(*wide)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), y)


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 64), torch.randint(8, (rows,))


def built() -> tuple[Classifier, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Classifier()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def planned(**options: Any) -> PlanResult:
    model, optimizer = built()
    chosen = {"budget": "1GB", "optimizer": optimizer, "lowering": "eager", **options}
    return memopt.plan(model, batch(), **chosen)


@pytest.fixture(scope="module")
def unplanned() -> PlanResult:
    """The step without a budget that binds."""
    return planned()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    """Losses and final gradients."""
    x, y = batch()
    torch.manual_seed(2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in model.parameters())]


def test_compiled_in_place_under_a_budget_it_trains_bit_for_bit_as_before(unplanned: PlanResult) -> None:
    plain, its_optimizer = built()
    want = train(plain, its_optimizer)
    model, optimizer = built()
    keys = list(model.state_dict())
    compiled: Any = memopt.compile(model, int(unplanned.peak * 0.9), optimizer=optimizer, numerics="exact")
    assert compiled is model
    assert type(model) is Classifier
    got = train(model, optimizer)
    assert all(map(torch.equal, want, got))
    assert list(model.state_dict()) == keys
    assert compiled.memopt.plan.plan.chosen  # the budget did bind
    assert compiled.memopt.measured.peak_bytes == pytest.approx(compiled.memopt.plan.peak, abs=64)
    assert "What memopt does" in compiled.memopt.report()


def test_evaluation_inference_copies_and_pickles_run_uncompiled(unplanned: PlanResult) -> None:
    model, optimizer = built()
    x, y = batch()
    compiled: Any = memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager")
    with pytest.raises(memopt.MemoptError, match="no plan yet"):
        compiled.memopt.report()
    model.eval()
    with torch.no_grad():
        want = model(x, y)
    assert compiled.memopt.plan is None  # inference plans nothing
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(x, y), want)
        twin.train()(x, y).backward()
        assert twin.memopt.plan is None
        with pytest.raises(memopt.MemoptError, match="copy of a compiled one"):
            twin.memopt.report()


def test_compiled_twice_the_last_budget_counts(unplanned: PlanResult) -> None:
    model, optimizer = built()
    memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager")
    train(model, optimizer, steps=1)
    tight = int(unplanned.peak * 0.9)
    compiled: Any = memopt.compile(model, tight, optimizer=optimizer, lowering="eager")
    train(model, optimizer, steps=1)
    assert compiled.memopt.plan.budget == tight
    assert compiled.memopt.plan.peak <= tight


def test_example_inputs_plan_at_once_and_a_refusal_leaves_the_model_as_it_was() -> None:
    model, optimizer = built()
    compiled: Any = memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager", example_inputs=batch())
    assert compiled.memopt.plan.plan.status.value == "fits"
    other, its_optimizer = built()
    with pytest.raises(memopt.BudgetError):
        memopt.compile(other, 10_000, optimizer=its_optimizer, lowering="eager", example_inputs=batch())
    assert other._compiled_call_impl is None
    assert not hasattr(other, "memopt")


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 8), lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))])
def test_bare_modules_of_torch_are_compiled_too(make: Callable[[], nn.Module]) -> None:
    model = make()
    memopt.compile(model, "1GB", lowering="eager")
    model(batch()[0]).sum().backward()
    handle: Any = model.memopt
    assert handle.plan.before.steps
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "keep", [pytest.param(True, id="logits held"), pytest.param(False, id="logits dropped", marks=pytest.mark.long)]
)
def test_a_hugging_face_model_measures_as_predicted_whatever_the_caller_keeps(keep: bool) -> None:
    workload = load("llama-tiny")
    torch.manual_seed(0)
    model, inputs = workload.build(), workload.inputs(4, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled: Any = memopt.compile(model, "1GB", optimizer=optimizer, example_inputs=inputs, lowering="eager")
    kept: list[Any] = []

    def loss() -> Tensor:
        kept.clear()  # the step before's are not this one's
        kept[:] = [model(**inputs)]
        value: Tensor = kept[0].loss
        if not keep:
            kept.clear()
        return value

    measured = measure_step(loss, optimizer, resident=[model, inputs], repeats=0)
    assert measured.peak_bytes == pytest.approx(compiled.memopt.plan.peak, abs=256)


def test_saving_and_generating_work_on_a_compiled_model(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    workload = load("llama-tiny")
    model: Any = workload.build()
    ids = workload.inputs(1, 8)["input_ids"]
    want = model.eval().generate(ids, max_new_tokens=4, do_sample=False)
    memopt.compile(model, "1GB", lowering="eager")
    model.train()(**workload.inputs(2, 16)).loss.backward()
    assert torch.equal(model.eval().generate(ids, max_new_tokens=4, do_sample=False), want)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class TwoOutputs(nn.Module):
    """A loss and the logits beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.inner(x)
        return nn.functional.cross_entropy(logits, y), logits


def test_a_gradient_beside_the_loss_is_refused_with_the_way_out_which_works() -> None:
    x, y = batch(16)
    model = TwoOutputs()
    memopt.compile(model, "1GB", lowering="eager")
    loss, logits = model(x, y)
    with pytest.raises(memopt.MemoptError, match='gradients="all"'):
        (loss + logits.square().mean()).backward()
    memopt.compile(model, "1GB", lowering="eager", gradients="all")
    model.zero_grad()
    loss, logits = model(x, y)
    (loss + logits.square().mean()).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss, logits = twin(x, y)
    (loss + logits.square().mean()).backward()
    assert torch.equal(model.inner.weight.grad, twin.inner.weight.grad)


def test_the_guard_speaks_once_with_figures(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = built()
    compiled: Any = memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager", example_inputs=batch(4096))
    x, y = batch(4096)
    model(x, y).backward()
    (guard,) = compiled.memopt._session.watch.guards.values()
    guard.predicted_peak //= 2
    with caplog.at_level(logging.WARNING, logger="memopt"):
        for _ in range(5):  # steps 2 and 4 are watched
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [record.getMessage() for record in caplog.records if "peaked at" in record.getMessage()]
    assert len(said) == 1
    assert f"{guard.predicted_peak / 2**20:.1f} MiB planned" in said[0]


def test_disabled_it_runs_as_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_DISABLE", "1")
    model, optimizer = built()
    compiled: Any = memopt.compile(model, 10_000, optimizer=optimizer, lowering="eager")
    train(model, optimizer, steps=1)
    assert compiled.memopt.plan is None


def test_dumps_are_readable_python_and_debug_logs_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, unplanned: PlanResult
) -> None:
    monkeypatch.setenv("MEMOPT_DUMP", str(tmp_path / "dump"))
    monkeypatch.setenv("MEMOPT_DEBUG", "3")
    model, optimizer = built()
    with caplog.at_level(logging.WARNING, logger="memopt"):
        memopt.compile(model, int(unplanned.peak * 0.9), optimizer=optimizer, lowering="eager")
        train(model, optimizer, steps=1)
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "dump").iterdir()}
    assert sorted(files) == [
        "00_captured.py",
        "10_batch_statistics.py",
        "20_unread_inputs.py",
        "30_kept_outputs.py",
        "40_relu_masks.py",
        "50_late_values.py",
        "60_late_gradients.py",
        "70_replay_random.py",
        "90_planned.py",
        "plan.json",
    ]
    for name in ("00_captured.py", "70_replay_random.py", "90_planned.py"):
        compile(files[name], name, "exec")
    again = [line for line in files["90_planned.py"].splitlines() if "__1 = " in line]
    assert again
    assert not [line for line in files["00_captured.py"].splitlines() if "__1 = " in line]
    assert "generator_state" in files["70_replay_random.py"]
    assert "net.3.weight" in files["00_captured.py"]
    assert '"status": "' in files["plan.json"]
    logged = caplog.text
    assert "pass replay_random: 1 sites" in logged
    assert "What memopt does" in logged
    assert "def step(" in logged


@pytest.mark.parametrize(("share", "status"), [(1.0, "fits"), (0.9, "feasible")])
def test_a_plan_of_fakes_promises_what_the_timeline_of_its_graph_says(
    unplanned: PlanResult, share: float, status: str
) -> None:
    result = planned(budget=int(unplanned.peak * share), numerics="exact")
    assert result.plan.status.value in (status, "optimal")
    assert result.peak <= int(unplanned.peak * share)
    assert result.baseline_peak == unplanned.peak


VIEWS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "shifted": lambda ids: (ids[:, :-1], ids[:, 1:]), "twice": lambda ids: (ids, ids),
    "viewed": lambda ids: (ids, ids.view_as(ids)), "halves": lambda ids: (ids[:4], ids[4:]),
}  # fmt: skip


@pytest.mark.parametrize("given", VIEWS.values(), ids=VIEWS)
def test_inputs_may_share_a_storage(given: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Causal language models take the same tokens as inputs and labels: their bytes count once."""

    class Bigrams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.embed(x).tanh()).flatten(0, 1), y.flatten())

    model, inputs = Bigrams(), given(torch.randint(50, (8, 33)))
    with pytest.raises(memopt.BudgetError) as refused:  # its ways out are views of one storage too
        memopt.compile(copy.deepcopy(model), 1000, example_inputs=inputs, lowering="eager")
    assert refused.value.ways_out
    optimizer = torch.optim.AdamW(model.parameters())
    memopt.compile(model, refused.value.floor_bytes, optimizer=optimizer, lowering="eager")
    measured = measure_step(lambda: model(*inputs), optimizer, resident=[model, inputs], repeats=0)
    assert measured.peak_bytes == model.memopt.plan.plan.peak


def test_a_refusal_says_the_floor_what_sets_it_and_the_ways_out_in_order(unplanned: PlanResult) -> None:
    with pytest.raises(memopt.BudgetError) as caught:
        planned(budget=int(unplanned.peak * 0.6), passes="-stream")
    error = caught.value
    assert error.budget_bytes == int(unplanned.peak * 0.6)
    assert error.budget_bytes < error.floor_bytes < unplanned.peak
    assert error.binding is not None
    assert sum(size for _, size in error.binding.kinds) == error.binding.bytes
    text = str(error)
    assert error.binding.step in text
    assert "test_api.py:" in text
    changes = {way.change.split(" ")[0]: way for way in error.ways_out}
    assert "256" in changes  # half the batch
    within = [way.peak_bytes <= error.budget_bytes for way in error.ways_out]
    assert within == sorted(within, reverse=True)
    raised = next(way for way in error.ways_out if way.change.startswith("budget="))
    again = planned(budget=raised.change.removeprefix('budget="').removesuffix('"'), passes="-stream")
    assert again.peak <= again.budget


def test_switched_off_recomputation_is_named_as_a_way_out(unplanned: PlanResult) -> None:
    with pytest.raises(memopt.BudgetError) as caught:
        planned(budget=int(unplanned.peak * 0.9), passes="-recompute,-pack_masks,-stream")
    assert caught.value.floor_bytes == unplanned.peak
    changes = {way.change: way for way in caught.value.ways_out}
    assert changes['passes without "-recompute"'].peak_bytes <= caught.value.budget_bytes
    assert changes['passes without "-pack_masks"'].peak_bytes < unplanned.peak
    lossy = [change for change in changes if change.startswith("allow=")]
    assert lossy == ['allow=("int8_activations",)']  # of all that are lossy the least


def test_an_optimizer_without_state_is_a_way_out() -> None:
    model, _ = built()
    with pytest.raises(memopt.BudgetError) as caught:
        memopt.plan(model, batch(8), budget="1MB", optimizer=torch.optim.AdamW(model.parameters()), lowering="eager")
    way = next(way for way in caught.value.ways_out if "SGD" in way.change)
    assert way.peak_bytes <= caught.value.floor_bytes - 2 * 4 * sum(p.numel() for p in model.parameters()) * 0.9
    assert way.numerics == "lossy"
