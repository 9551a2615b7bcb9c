"""Recurrent networks compiled with numerics="exact" are plain PyTorch's to the bit, in every form nn.LSTM has."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import memopt
from memopt.capture import survey
from memopt.facts import op_name
from memopt.photograph import photograph
from memopt.recurrent import by_onednn
from memopt.refusal import Refused
from memopt.runtime.lstm_layer import _asked, lstm_layer, workspace_bytes
from memopt.runtime.measure import measure_step
from memopt.runtime.opcost import OpCosts

BF16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU's oneDNN has no bf16")
STEPS, BATCH, WIDTH, HIDDEN = 6, 3, 5, 8

# name -> (options of nn.LSTM, whether torch takes oneDNN's layers for it)
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True), "batch first": ({"batch_first": True}, True), "no bias": ({"bias": False}, True),
    "both ways": ({"bidirectional": True}, True), "layers": ({"num_layers": 3}, True),
    "dropout": ({"num_layers": 3, "dropout": 0.3}, True),
    "all": ({"num_layers": 2, "dropout": 0.5, "bidirectional": True, "bias": False, "batch_first": True}, True),
    "projected": ({"proj_size": 4}, False),
    "projected dropout": ({"proj_size": 4, "num_layers": 2, "dropout": 0.5}, False),
    "double": ({"dtype": torch.float64, "num_layers": 2, "dropout": 0.5, "bidirectional": True}, False),
}  # fmt: skip
SLOWEST = ("projected dropout", "double")  # unrolled, layer by layer


class Net(nn.Module):
    """A linear layer, a recurrent one, and a loss that reads its output and, if asked, its last states."""

    def __init__(self, inner: nn.Module, states: bool = True, given: bool = False, data: bool = False) -> None:
        super().__init__()
        dtype = next(inner.parameters()).dtype
        self.before, self.inner = nn.Linear(WIDTH, WIDTH, dtype=dtype), inner
        self.states, self.given, self.data = states, given, data

    def forward(self, x: Tensor) -> Tensor:
        y, last = self.inner(x if self.data else self.before(x), self.first(x) if self.given else None)
        ends = last if isinstance(last, tuple) else (last,)
        loss = y.square().mean()
        return loss + sum(end.sin().mean() for end in ends) if self.states else loss

    def first(self, x: Tensor) -> Any:
        inner: Any = self.inner
        rows = inner.num_layers * (2 if inner.bidirectional else 1)
        batch = x.shape[0] if inner.batch_first else x.shape[1]
        h = self.before.weight.sum() * x.new_ones(rows, batch, inner.proj_size or inner.hidden_size)
        return h, 2 * self.before.bias.sum() * x.new_ones(rows, batch, inner.hidden_size)


def net(seed: int = 0, cell: Callable[..., nn.Module] = nn.LSTM, **options: Any) -> Net:
    own = {name: options.pop(name) for name in ("states", "given", "data") if name in options}
    torch.manual_seed(seed)
    return Net(cell(WIDTH, HIDDEN, **options), **own)


def data(model: Net) -> Tensor:
    return torch.randn(STEPS, BATCH, WIDTH, dtype=model.before.weight.dtype)


def step(model: Net, x: Tensor) -> list[Tensor | None]:
    """Loss and gradients of the step drawn with seed 2."""
    torch.manual_seed(2)
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


class Called(TorchDispatchMode):
    """The names of the operations that untraced torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def assert_exact(model: Net, budget: int = 2**30) -> set[str]:
    """The compiled step equals the plain one, twice; the operations of its program."""
    torch._dynamo.reset()
    x, twin = data(model), copy.deepcopy(model)
    memopt.compile(twin, budget, example_inputs=(x,), lowering="eager", numerics="exact")
    wanted = step(model, x)
    for _ in range(2):
        for name, a, b in zip(["loss", *dict(model.named_parameters())], wanted, step(twin, x), strict=True):
            assert (a is None) == (b is None), name
            assert a is None or (b is not None and a.dtype is b.dtype and torch.equal(a, b)), name
        twin.zero_grad(set_to_none=True)
    return {step.op for step in twin.memopt._session.latest.result.after.steps}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.long] if form in SLOWEST else []) for form in FORMS]
)
@pytest.mark.parametrize("data", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "on data"])
def test_every_form_is_plain_torchs_to_the_bit(form: str, data: bool) -> None:
    options, onednn = FORMS[form]
    with Called() as called:
        net(data=data, **options)(torch.randn(STEPS, BATCH, WIDTH, dtype=options.get("dtype")))
    assert ("aten.mkldnn_rnn_layer.default" in called.names) is onednn  # this torch still does what we assume
    assert ("memopt.lstm_layer.default" in assert_exact(net(data=data, **options))) is onednn


@pytest.mark.parametrize("options", [{"given": True}, {"states": False}, {"given": True, "bidirectional": True}])
def test_states_given_and_states_unread(options: dict[str, Any]) -> None:
    assert "memopt.lstm_layer_backward.default" in assert_exact(net(**options))


def test_frozen_weights() -> None:
    model = net(num_layers=2)
    model.inner.weight_hh_l0.requires_grad_(False)
    model.inner.bias_ih_l1.requires_grad_(False)
    assert_exact(model)
    model = net(num_layers=2)
    model.inner.requires_grad_(False)
    assert_exact(model)


@BF16
def test_half_the_bytes() -> None:
    assert "memopt.lstm_layer.default" in assert_exact(net(dtype=torch.bfloat16, num_layers=2, bidirectional=True))


class Autocast(Net):
    """The same under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


@BF16
@pytest.mark.parametrize("data", [False, True], ids=["", "on data"])
def test_autocast_casts_what_goes_into_a_layer(data: bool) -> None:
    torch.manual_seed(0)
    model = Autocast(nn.LSTM(WIDTH, HIDDEN, 2, dropout=0.5), states=False, data=data)
    assert "memopt.lstm_layer.default" in assert_exact(model)


@pytest.mark.long
@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN])
def test_other_cells_keep_the_dropout_between_layers(cell: Callable[..., nn.Module]) -> None:
    model = net(cell=cell, num_layers=3, dropout=0.5, bidirectional=True)
    assert any("bernoulli" in op or "dropout" in op or op == "draw" for op in assert_exact(model))


@pytest.mark.parametrize("hidden", [7, pytest.param(40, marks=pytest.mark.long)])
def test_a_gru_rounds_as_untraced_where_rows_are_no_whole_vectors(hidden: int) -> None:
    assert_exact(net(cell=lambda width, _: nn.GRU(width, hidden, bias=False, batch_first=True)))


@pytest.mark.long
def test_autocast_casts_a_grus_weight_once_a_step() -> None:
    torch.manual_seed(0)
    assert_exact(Autocast(nn.GRU(WIDTH, HIDDEN, 2, dropout=0.5), states=False))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gru_in_other_dtypes(dtype: torch.dtype) -> None:
    assert_exact(net(cell=nn.GRU, dtype=dtype))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_without_onednn_it_is_the_cells_of_plain_torch() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert "memopt.lstm_layer.default" not in assert_exact(net(states=False))


def test_onednn_is_not_taken_where_torch_does_not() -> None:
    x, weights = torch.randn(STEPS, BATCH, WIDTH), list(nn.LSTM(WIDTH, HIDDEN).parameters())
    states = (torch.zeros(1, BATCH, HIDDEN),) * 2
    assert by_onednn(x, states, weights)
    assert not by_onednn(x[:0], states, weights)
    assert not by_onednn(x.double(), states, weights)
    assert not by_onednn(x, (states[0][..., :4], states[1]), weights)
    with torch.no_grad():
        assert not by_onednn(x, states, weights)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not by_onednn(x, states, weights)


def test_inductor_and_reordered_numerics_keep_the_cells() -> None:
    model = net(data=True, num_layers=2, dropout=0.5)  # on data: torch's decomposition would take it for an inference
    found = survey(model, (data(model),), {}, lambda program: program, exact=False)
    ops = {op_name(node) for node in found.captures[0].program.graph.nodes}
    assert "aten.sigmoid.default" in ops
    assert any("dropout" in op or "bernoulli" in op for op in ops)
    assert not [op for op in ops if "lstm" in op or "mkldnn" in op]


def test_a_layer_is_recomputed_to_the_bit_and_the_budget_held(unadvised: None) -> None:
    """Three layers whose workspaces do not fit together: at the floor one is made again in the backward."""
    model = net(num_layers=3)
    optimizer = torch.optim.SGD(model.parameters())
    x = data(model)
    with pytest.raises(memopt.BudgetError) as refused:
        compiled(model, 1, optimizer, x)
    floor = refused.value.floor_bytes
    compiled(model, floor, optimizer, x)
    latest = model.memopt._session.latest
    assert [s.op for s in latest.result.after.steps].count("memopt.lstm_layer.default") > 3
    took = measure_step(lambda: model(x), optimizer, resident=[model, x], repeats=0)
    assert took.peak_bytes == latest.released.plan.peak <= floor
    assert_exact(net(num_layers=3), floor + 2**14)


def compiled(model: Net, budget: int, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    torch._dynamo.reset()
    memopt.compile(model, budget, optimizer=optimizer, example_inputs=(x,), lowering="eager", numerics="exact")


def test_the_workspace_is_known_without_running_the_whole_length() -> None:
    """Against oneDNN's own, over odd and even sizes; short lengths it is asked for directly."""
    draw, longer = random.Random(0), 0
    for _ in range(200):
        batch, width = draw.choice((1, 4, 7, 16, 33, 64)), draw.choice((1, 16, 17, 100, 128))
        sizes = (draw.randint(2, 300), batch, width, draw.choice((3, 16, 32, 50, 64, 128)), torch.float32)
        before = _asked.cache_info().currsize
        found = workspace_bytes(*sizes)
        asked = _asked.cache_info().currsize - before
        longer += _asked.__wrapped__(*sizes) == found and asked != 1
        assert found == _asked.__wrapped__(*sizes), sizes
    assert longer > 50


def test_both_operations_are_priced_on_made_up_arguments() -> None:
    """With a workspace of the true size: the backward would read past the end of an empty one."""
    model = net()
    program = survey(model, (data(model),), {}, lambda program: program).captures[0].program
    nodes = [node for node in program.graph.nodes if "lstm_layer" in op_name(node)]
    costs = OpCosts(cache=None).measure_all(nodes)
    assert len(nodes) == len(costs) == 2
    made = {step.op: step for step in photograph(program).steps}
    assert all(cost.workspace > 0 and cost.seconds > 0 for cost in costs.values())
    assert {"memopt.lstm_layer.default", "memopt.lstm_layer_backward.default"} <= made.keys()


def test_the_same_call_gives_the_same_bits() -> None:
    """What recomputing relies on, and oneDNN's scratch in the workspace does not disturb."""
    x, h = torch.randn(33, 17, 65), torch.randn(17, 129)
    w_ih, w_hh, bias = torch.randn(516, 65), torch.randn(516, 129), torch.randn(516)
    given = (x, w_ih, w_hh, bias, bias, h, h.clone(), True)
    first, again = lstm_layer(*given), lstm_layer(*given)
    assert all(map(torch.equal, first[:3], again[:3]))
    y, hy, cy, workspace = first
    backward = torch.ops.memopt.lstm_layer_backward
    one, two = (backward(*given, y, hy, cy, workspace, y, None, None) for _ in range(2))
    assert all(map(torch.equal, one, two))
    assert all(map(torch.equal, one, backward(*given, *again, y, None, None)))


@pytest.mark.long
def test_a_refusal_names_reordered_numerics_and_they_hold_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's layer is one operation and cannot be cut; the cells can."""
    monkeypatch.setattr(Refused, "_changes", Refused._numerics)  # no other way out is looked at
    net, x = Net(nn.LSTM(WIDTH, HIDDEN)), torch.randn(24, BATCH, WIDTH)
    with pytest.raises(memopt.BudgetError) as refused:
        memopt.compile(copy.deepcopy(net), 1, example_inputs=(x,), numerics="exact")
    way = next(way for way in refused.value.ways_out if "numerics" in way.change)
    assert way.numerics == "reordered"
    assert way.peak_bytes < refused.value.floor_bytes
    options: dict[str, Any] = eval(f"dict({way.change})")
    optimizer = torch.optim.AdamW(net.parameters())
    memopt.compile(net, way.peak_bytes, optimizer=optimizer, example_inputs=(x,), **options)
    assert measure_step(lambda: net(x), optimizer, resident=[net, x], repeats=0).peak_bytes <= way.peak_bytes
