"""What cannot be captured is one sentence that names the user's line, and the model stays as it was."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.errors import Killed
from memopt.report import PlanResult


class Made(nn.Module):
    """Two linear layers around what a test puts between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], last: Callable[[Tensor], Tensor] = torch.sum) -> None:
        super().__init__()
        self.rise, self.fall, self.middle, self.last = nn.Linear(8, 32), nn.Linear(32, 8), middle, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fall(self.middle(self.rise(x))))


def branch(x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 0 else x.sin()


def read_item(x: Tensor) -> Tensor:
    return x * x.sum().item()


class OnItem(Made):
    """Its first graph gives a scalar that has a gradient and is no loss, beside what the rest is made of."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fall(self.rise(x))
        return self.last(y.relu() if y.sum().item() > 0 else y.sin())


def select(x: Tensor) -> Tensor:
    return x[x[:, 0] > 0]


def bad_view(x: Tensor) -> Tensor:
    return x.view(3, -1)


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x.relu()


def line_of(function: Callable[..., Tensor]) -> str:
    return f"test_capture.py:{inspect.getsourcelines(function)[1] + 1} in {function.__name__}"


def planned(model: nn.Module, x: Tensor | None = None, **options: object) -> PlanResult:
    inputs = (torch.randn(16, 8) if x is None else x,)
    return memopt.plan(model, inputs, budget="1GB", lowering="eager", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("middle", [branch, read_item, select])
def test_what_stands_before_a_branch_on_data_is_planned(middle: Callable[[Tensor], Tensor]) -> None:
    model = Made(middle)
    found = planned(model, optimizer=torch.optim.AdamW(model.parameters()))
    note = next(note for note in found.notes if "depends on data" in note)
    assert line_of(middle) in note
    assert "not in the plan" in note
    assert {"rise.weight", "fall.weight"} <= set(found.before.tensors)


# In the run itself, as in any torch.compile, Dynamo looks at .grad of what crosses the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("model", [Made(branch), Made(read_item), OnItem(torch.relu)])
def test_a_branch_on_data_trains_as_it_did(model: Made) -> None:
    x = torch.randn(16, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(x)
    loss.backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager", numerics="exact")
    for _ in range(2):
        optimizer.zero_grad()
        again = model(x)
        again.backward()
        assert torch.equal(again, loss)
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(map(torch.equal, found, plain))
        assert len(found) == 4


def test_nothing_before_the_branch_is_an_error_at_its_line() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(branch(x)).sum()

    with pytest.raises(memopt.CaptureError) as caught:
        planned(First())
    assert line_of(branch) in str(caught.value)
    assert "torch.compiler.disable" in str(caught.value)


@pytest.mark.parametrize("frozen", [False, True])
def test_sparse_gradients_are_refused_by_name(frozen: bool) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.net = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 1)
            self.words.weight.requires_grad_(not frozen)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.words(x)).sum()

    if frozen:  # then it has no gradient at all
        assert planned(Words(), torch.randint(10, (4,))).peak > 0
    else:
        with pytest.raises(memopt.CaptureError, match=r"words is an Embedding with sparse=True.*sparse=False"):
            planned(Words(), torch.randint(10, (4,)))


def test_integers_alone_cannot_be_trained() -> None:
    with pytest.raises(memopt.CaptureError, match=r"returns int64\[16\].*return the loss"):
        planned(Made(torch.relu, lambda y: y.argmax(-1)))
    with pytest.raises(memopt.CaptureError, match="none of the model's parameters requires one"):
        planned(Made(torch.relu).requires_grad_(False))


def test_an_error_of_the_forward_is_told_whole(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(memopt.CaptureError) as caught:
        planned(Made(bad_view))
    assert f"{line_of(bad_view)}: RuntimeError: shape '[3, -1]' is invalid for input of size 512" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        memopt.CaptureError, match=r"test_capture.py.* in forward: RuntimeError: .*\[16, 9\] X \[8, 32\]"
    ):
        planned(Made(torch.relu), torch.randn(16, 9))  # torch's own line is not the user's
    assert not [record for record in caplog.records if record.name == "torch._subclasses.fake_tensor"]


class Odd(Exception):
    """An error class of the user's own."""


RAISED = [ValueError("no"), KeyError("no"), AttributeError("no"), IndexError("no"), AssertionError("no"), Odd("no")]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_an_error_the_forward_raises_is_told_with_its_line_and_is_the_cause(error: Exception) -> None:
    def refuse(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(memopt.CaptureError) as caught:
        planned(Made(refuse))
    assert f"{line_of(refuse)}: {type(error).__name__}: {error}; if it does not fail without" in str(caught.value)
    assert isinstance(caught.value.__cause__, type(error))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_leaving_the_process_in_forward_is_an_error_and_a_signal_is_none() -> None:
    def leave(x: Tensor) -> Tensor:
        sys.exit(7)

    def killed(x: Tensor) -> Tensor:
        raise Killed(143)

    with pytest.raises(memopt.CaptureError, match=r"in leave: SystemExit: 7"):
        planned(Made(leave))
    with pytest.raises(Killed):
        planned(Made(killed))


def test_inputs_that_are_missing_are_named() -> None:
    class Several(Made):
        def forward(self, x: Tensor, y: Tensor, *, scale: float, bias: float = 0) -> Tensor:  # type: ignore[override]
            return super().forward(x + y) * scale + bias

    with pytest.raises(memopt.CaptureError, match="do not fit the model's forward: y and scale are missing"):
        planned(Several(torch.relu))
    with pytest.raises(memopt.CaptureError, match="unexpected keyword argument 'z'"):
        memopt.plan(Several(torch.relu), {"z": torch.randn(4, 8)}, budget="1GB")


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_a_forward_that_runs_outside_every_graph_is_an_error_at_the_line_that_breaks() -> None:
    class Locked(Made):
        def forward(self, x: Tensor) -> Tensor:
            with threading.Lock():
                y = self.rise(x)
            return y.sum()

    with pytest.raises(memopt.CaptureError, match=r"could not be captured at .*test_capture.py.* in forward") as caught:
        planned(Locked(torch.relu))
    assert f":{inspect.getsourcelines(Locked.forward)[1] + 1} in" in str(caught.value)


class Penalty(Made):
    """The loss and the square of its gradient by x."""

    def penalty(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.rise(x).tanh().sum(), x, create_graph=True)
        return slope.square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.penalty(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_gradient_that_is_differentiated_is_refused_at_its_line_and_the_way_out_works() -> None:
    with pytest.raises(memopt.CaptureError, match=r"create_graph=True.*under torch.compiler.disable") as caught:
        planned(Penalty(torch.relu))
    assert f":{inspect.getsourcelines(Penalty.penalty)[1] + 2} in penalty" in str(caught.value)

    class Apart(Penalty):
        penalty = torch.compiler.disable(Penalty.penalty)

    model, x = Apart(torch.relu), torch.randn(16, 8)
    model(x).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    memopt.compile(model, "1GB", lowering="eager", numerics="exact")(x).backward()
    assert all(map(torch.equal, [p.grad for p in model.parameters() if p.grad is not None], plain))


@pytest.mark.parametrize("last", [torch.sum, torch.argmax])
def test_a_refused_model_is_as_it_was(last: Callable[[Tensor], Tensor]) -> None:
    model = Made(bad_view, last)
    before, state = dict(vars(model)), copy.deepcopy(model.state_dict())
    with pytest.raises(memopt.CaptureError):
        memopt.compile(model, "1GB", example_inputs=(torch.randn(16, 8),), lowering="eager")
    assert vars(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "memopt")


def test_surveying_a_graph_break_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert planned(Made(broken)).breaks >= 1
    assert not [w for w in told if "not a leaf" in str(w.message)]


def test_parameters_nobody_reads_are_the_optimizers_all_the_same() -> None:
    class Unread(Made):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.spare = nn.Linear(8, 8)

    model = Unread()
    found = planned(model, optimizer=torch.optim.AdamW(model.parameters()))
    assert "state:rise.weight:exp_avg" in found.before.tensors
    assert "state:spare.weight:exp_avg" not in found.before.tensors


class Named(nn.Module):
    """Tensors called like the operations that read them, one of them like a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.mul = nn.Parameter(torch.ones(8))
        self.topk = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
        self.register_buffer("tanh", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        values, _ = torch.topk(torch.tanh(x * self.mul) * self.tanh, 4)
        return (values * self.topk[0] * self.topk[1]).square().mean()


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_tensors_may_be_called_like_operations(lowering: str) -> None:
    model, x = Named(), torch.randn(16, 8)
    want = model(x)
    want.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    memopt.compile(model, "1GB", example_inputs=(x,), lowering=lowering)
    loss = model(x)
    loss.backward()
    assert torch.allclose(loss, want)
    assert all(
        torch.allclose(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True) if p.grad is not None
    )
