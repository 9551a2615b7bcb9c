"""Trained weights in bytes: read, updated and written again; the bits of plain training, or rounded without bias."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt import optim
from memopt.coded import codable, coded, decode_weights, store_weights
from memopt.kernels import pages
from memopt.optim.alone import ELEMENTWISE, piece
from memopt.optim.coded import LISTED, coded_of
from memopt.optim.photograph import photograph_optimizer
from memopt.optim.stepper import Stepper
from memopt.planfile import save_plan
from memopt.refusal import Refused
from memopt.runtime.measure import measure_step
from memopt.runtime.trace import record
from memopt.timeline import peak

TYPES = (torch.bfloat16, torch.float32)


# -- optimizers -------------------------------------------------------------------------------------------------------


def perceptron(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 700), nn.GELU(), nn.Linear(700, 96)).to(dtype)


def ran(model: nn.Module, optimizer: Any, steps: int = 4, clip: float | None = None, seed: int = 5) -> list[float]:
    losses = []
    for at in range(steps):
        dtype = next(model.parameters()).dtype
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(seed + at)).to(dtype)
        loss = model(x).float().pow(2).mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def _of(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        params = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
        return getattr(optim if hasattr(optim, name) else torch.optim, name)(params, **options)

    return build


OPTIMIZERS = {
    **{kind.__name__: _of(kind.__name__) for kind in sorted(ELEMENTWISE, key=str)},
    **{name: _of(name, lr=1e-2) for name in ("AdamWBf16", "AdamW8bit", "AdamW4bit", "Frugal")},
    **{name: _of(name, lr=1e-2, rank=4) for name in ("GaLore", "QGaLore", "Apollo", "NaturalGaLore")},
    **{name: _of(name, lr=1e-2, in_backward=False) for name in ("Lomo", "AdaLomo")},
    "Adafactor": _of("Adafactor"),
    "Muon": _of("Muon"),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_coded_weights_is_plain_training_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    plain, model = perceptron(dtype), perceptron(dtype)
    first, second = OPTIMIZERS[name](plain), OPTIMIZERS[name](model)
    done = store_weights(model, second)
    assert done.after < done.before * (0.77 if dtype.itemsize == 2 else 0.89)
    assert ran(plain, first) == ran(model, second)
    assert same(plain, model)
    weight = model[0].parametrizations.weight.original
    assert weight.untyped_storage().nbytes() == weight.element_size()
    held = (group["params"] for each in (first, second) for group in each.param_groups)
    for p, q in zip(*held, strict=True):
        mine, other = first.state.get(p, {}), second.state.get(q, {})
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert not isinstance(value, Tensor) or torch.equal(value, other[key])


def test_in_pieces_of_whole_pages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pages.PAGE, "cpu", 1 << 14)
    plain, model = perceptron(torch.float32), perceptron(torch.float32)
    first, second = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (plain, model))
    store_weights(model, second)
    Stepper(second, portion=1 << 15).install()
    each = piece(second, 1 << 15, model[0].parametrizations.weight.original, "cpu")
    assert each == 1 << 14, "a page, though a portion is half of one"
    assert ran(plain, first) == ran(model, second)
    assert same(plain, model)


@pytest.mark.parametrize("codec", ["exponents", "int8"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_an_update_takes_what_is_predicted_of_it(codec: str, dtype: torch.dtype) -> None:
    """The values, and what coding takes inside itself."""
    model = perceptron(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    store_weights(model, optimizer, codec)
    model(torch.ones(8, 96).to(dtype)).float().sum().backward()
    phase = photograph_optimizer([*model.named_parameters()], optimizer)
    lasting = sum(phase.storages[phase.tensors[name].storage].nbytes for name in phase.given)
    optimizer.step()
    taken = record(optimizer.step).peak()
    assert taken > model[0].weight.nbytes
    predicted = peak(phase.graph()) - lasting
    assert taken <= predicted <= taken + LISTED + 64


def test_gradients_can_be_clipped() -> None:
    plain, model = perceptron(), perceptron()
    first, second = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (plain, model))
    store_weights(model, second)
    assert ran(plain, first, clip=0.01) == ran(model, second, clip=0.01)
    assert same(plain, model)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["AdamW", "QGaLore", "AdamW8bit", "SGD"])
def test_weights_in_8_bits_train_nearly_as_well(name: str, dtype: torch.dtype) -> None:
    plain, model = perceptron(dtype), perceptron(dtype)
    first, second = OPTIMIZERS[name](plain), OPTIMIZERS[name](model)
    done = store_weights(model, second, "int8")
    assert done.after < done.before * 2.1 / (2 * dtype.itemsize)
    for group in (*first.param_groups, *second.param_groups):
        group["lr"] = {"SGD": 1.0, "QGaLore": 1e-2}.get(name, 1e-3)
    before, after = ran(plain, first, 30), ran(model, second, 30)
    assert before[-1] < 0.7 * before[0]
    assert after[-1] < before[-1] + 0.1 * (before[0] - before[-1])


def test_a_family_updates_weights_in_8_bits_by_less_than_bf16_could_tell() -> None:
    """AdamW8bit computes in fp32: an update of 1e-5 of a weight near 1 is below bf16's 2^-8, and made on average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(1 + torch.rand(256, 64) / 64)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-5, weight_decay=0.0)
    store_weights(model, optimizer, "int8")
    p = model[0].parametrizations.weight.original
    before = coded_of(p).read(p, None, torch.float32).mean()
    for _ in range(50):
        p.grad = torch.ones(256, 64, dtype=torch.bfloat16)
        optimizer.step()
    assert float(before - coded_of(p).read(p, None, torch.float32).mean()) == pytest.approx(50e-5, rel=0.3)


# -- what codes do not take -------------------------------------------------------------------------------------------


def scattered(p: Tensor) -> Tensor:
    """A gradient whose SGD step of rate 1 leaves numbers of every size in the place of zeros."""
    return -(2.0 ** torch.randint(-60, 0, p.shape, generator=torch.Generator().manual_seed(3)).float()).to(p.dtype)


@pytest.mark.parametrize("portion", [None, 1 << 15])
def test_a_weight_that_leaves_the_codes_is_whole_again_and_no_bit_is_lost(
    portion: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(pages.PAGE, "cpu", 1 << 13)
    plain, model = perceptron(torch.float32), perceptron(torch.float32)
    first, second = (torch.optim.SGD(each.parameters(), lr=1.0) for each in (plain, model))
    store_weights(model, second)
    Stepper(second, portion=portion).install()
    weight = model[0].parametrizations.weight.original
    with caplog.at_level(logging.WARNING, "memopt"):
        for gradient in (plain[0].weight.detach().clone(), scattered(weight)):
            plain[0].weight.grad, weight.grad = gradient, gradient.clone()
            first.step()
            second.step()
    assert "no longer coded" in caplog.text
    assert coded_of(weight) is None
    assert not model[0].parametrizations.weight[0].packed.untyped_storage().nbytes()
    assert torch.equal(weight, plain[0].weight)
    optimizers = [group for each in (first, second) for group in each.param_groups]
    for group in optimizers:
        group["lr"] = 1e-2
    assert ran(plain, first) == ran(model, second)
    assert same(plain, model)
    other = perceptron(torch.float32)
    model.load_state_dict(other.state_dict())
    assert same(model, other)
    assert decode_weights(model) == ("0.weight", "2.weight")
    assert same(model, other)


def test_a_weight_that_is_spread_too_far_stays_as_it_is() -> None:
    model = perceptron(torch.float32)
    with torch.no_grad():
        model[0].weight.copy_(scattered(model[0].weight))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"'0\.weight' cannot be stored as exponents: its exponents are spread"):
        store_weights(model, optimizer, names=["0.weight"])
    assert store_weights(model, optimizer).names == ("2.weight",)


# -- the module -------------------------------------------------------------------------------------------------------


def test_what_can_be_stored_is_a_trained_matrix_that_the_optimizer_updates_by_itself() -> None:
    model = perceptron()
    assert list(codable(model, torch.optim.SGD(model.parameters()))) == ["0.weight", "2.weight"]
    assert list(codable(model, torch.optim.SGD(model[2].parameters()))) == ["2.weight"]
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    assert list(codable(model, torch.optim.SGD(model.parameters()))) == ["2.weight"]
    model[2].weight.requires_grad_(False)
    assert not codable(model, torch.optim.SGD(model.parameters()))
    model = perceptron()
    assert not codable(model, None)
    assert not codable(model, torch.optim.LBFGS(model.parameters()))
    assert not codable(model, optim.Lomo(model.parameters()))


def test_what_cannot_be_stored_is_refused_and_nothing_changed() -> None:
    model = perceptron()
    before, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="codec='nf4' is not known; known are exponents, int8"):
        store_weights(model, optimizer, "nf4")
    with pytest.raises(ValueError, match=r"'1\.weight' cannot be stored so; what can is 0\.weight, 2\.weight"):
        store_weights(model, optimizer, names=["1.weight"])
    with pytest.raises(ValueError, match="Linear has no trained weight to store in bytes"):
        store_weights(nn.Linear(4, 4), torch.optim.SGD(model.parameters()))
    assert same(model, before)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight is not finite"):
        store_weights(model, optimizer, "int8")
    assert not any(map(coded, model))


def test_a_stored_model_is_not_converted_and_says_how() -> None:
    model = perceptron()
    store_weights(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match=r"call memopt\.coded\.decode_weights\(model\), then this again"):
        model.float()
    model.cpu()  # where it is
    assert len(decode_weights(model)) == 2
    assert model.float()[0].weight.dtype is torch.float32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_knows_nothing_of_it_is_an_error_and_changes_nothing(kind: Any, fused: bool) -> None:
    """Fused kernels would write past the one number."""
    model = perceptron(torch.float32)
    store_weights(model, torch.optim.SGD(model.parameters()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for params in (model[0].parameters(), copy.deepcopy(model)[0].parameters()):
        held = list(params)
        for p in held:
            p.grad = torch.ones(p.shape)
        other = kind(held, lr=0.1, fused=fused)
        with pytest.raises(RuntimeError, match="holds 1 parameters whose values are in bytes, and does not know"):
            other.step()
        assert not other.state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("codec", ["exponents", "int8"])
def test_a_copy_trains_loads_and_ends_as_the_model_does(codec: str) -> None:
    model = perceptron()
    store_weights(model, torch.optim.SGD(model.parameters()), codec)
    twin = copy.deepcopy(model)
    first, second = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, twin))
    for each in (first, second):
        Stepper(each).install()
    assert ran(model, first) == ran(twin, second)
    assert same(model, twin)
    weight, other = (each[0].parametrizations.weight.original for each in (model, twin))
    assert other.untyped_storage().nbytes() == other.element_size()
    assert coded_of(other).packed is twin[0].parametrizations.weight[0].packed is not coded_of(weight).packed
    ran(model, first, 1)
    assert not same(model, twin)
    twin.load_state_dict(model.state_dict())
    assert codec == "int8" or same(model, twin)
    values = {key: value.clone() for key, value in twin.state_dict().items()}
    assert decode_weights(copy.deepcopy(twin)) == decode_weights(twin) == ("0.weight", "2.weight")
    assert all(torch.equal(value, values[key]) for key, value in twin.state_dict().items())
    assert copy.deepcopy(twin)[0].weight.is_contiguous()


def test_what_is_compiled_is_not_stored_by_hand() -> None:
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters())
    memopt.compile(model, budget="1GB", optimizer=optimizer, lowering="eager")
    with pytest.raises(ValueError, match=r"memopt\.compile has planned this model"):
        store_weights(model, optimizer)
    bag = nn.EmbeddingBag(500, 32, sparse=True)
    assert not codable(bag, torch.optim.SGD(bag.parameters()))


def test_keys_stay_in_their_order_and_signs_of_zeros_are_loaded() -> None:
    model, plain = perceptron(), perceptron()
    store_weights(model, torch.optim.SGD(model.parameters()))
    assert list(model.state_dict()) == list(plain.state_dict())
    for sign in (1.0, -1.0):
        with torch.no_grad():
            plain[0].weight.fill_(0.0).mul_(sign)
        model.load_state_dict(plain.state_dict())
        assert bool(model[0].weight.signbit().all()) == (sign < 0)


def test_what_is_not_finite_is_loaded_as_it_is() -> None:
    model, plain = perceptron(), perceptron()
    store_weights(model, torch.optim.SGD(model.parameters()), "int8")
    with torch.no_grad():
        plain[0].weight[3, 4] = float("inf")
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("codec", ["exponents", "int8"])
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "QGaLore"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(codec: str, name: str, tmp_path: Path) -> None:
    model = perceptron()
    optimizer = OPTIMIZERS[name](model)
    store_weights(model, optimizer, codec)
    ran(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    went_on = ran(model, optimizer, 3, seed=50)
    saved = torch.load(tmp_path / "checkpoint")
    again = nn.Sequential(nn.Linear(96, 700), nn.GELU(), nn.Linear(700, 96)).bfloat16()
    resumed = OPTIMIZERS[name](again)
    store_weights(again, resumed, codec)
    assert str(again.load_state_dict(saved["model"])) == "<All keys matched successfully>"
    resumed.load_state_dict(saved["optimizer"])
    assert ran(again, resumed, 3, seed=50) == went_on
    assert same(again, model)
    plain = perceptron()
    plain.load_state_dict(saved["model"])
    other = OPTIMIZERS[name](plain)
    other.load_state_dict(saved["optimizer"])
    ran(plain, other, 1)


def test_checkpoints_that_do_not_fit_are_torchs_errors() -> None:
    model = perceptron()
    store_weights(model, torch.optim.SGD(model.parameters()))
    state = perceptron().state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"\.'):
        model.load_state_dict({key: value for key, value in state.items() if key != "0.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "0.weight": torch.zeros(3, 3)})
    assert torch.equal(model[0].weight, state["0.weight"])


# -- plans ------------------------------------------------------------------------------------------------------------

WIDTH = 256


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Tower(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().pow(2).mean()


def tower(depth: int = 4) -> Tower:
    torch.manual_seed(0)
    return Tower(depth).to(torch.bfloat16)


def batch(at: int = 0, rows: int = 32) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(at)).to(torch.bfloat16)


def trained(model: nn.Module, budget: Any, steps: int = 3, **options: Any) -> tuple[list[float], Callable[[], int]]:
    """Losses of some steps, and what measures the peak of one more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if budget is not None:
        memopt.compile(model, budget=budget, optimizer=optimizer, **{"lowering": "eager", **options})
    losses = []
    for at in range(steps):
        loss = model(batch(at))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    x = batch(steps)
    return losses, lambda: measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes


@cache
def floor(*allow: str, update: str = "step") -> int:
    """The least budget of a step."""
    model = tower()
    return floor_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3), allow=allow, lowering="eager", update=update)


def floor_of(model: nn.Module, optimizer: Any, **options: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refused, "ways_out", lambda self: ())
        with pytest.raises(memopt.BudgetError) as refused:
            memopt.compile(model, budget=1, optimizer=optimizer, example_inputs=(batch(),), **options)
    assert refused.value.floor_bytes is not None
    assert not any(map(coded, model.modules())), "a refusal changes nothing"
    return refused.value.floor_bytes


@pytest.mark.parametrize("update", ["step", pytest.param("backward", marks=pytest.mark.long)])
def test_by_consent_weights_are_coded_where_nothing_else_fits_and_no_bit_changes(update: str) -> None:
    least = floor("coded_trained", update=update)
    assert least < floor(update=update) - 200_000
    plain, model = tower(), tower()
    wanted, _ = trained(plain, None)
    budget = int(1.01 * least)
    got, measured = trained(model, budget, allow=("coded_trained",), update=update)
    plan = model.memopt.plan
    assert got == wanted
    assert same(plain, model)
    peak = measured()
    assert plan.peak - LISTED - 16 <= peak <= plan.peak <= budget
    (lever,) = (lever for lever in plan.levers if lever.lever == "coded_trained")
    assert (lever.count, lever.numerics) == (sum(map(coded, model.modules())), "exact")
    how = "trained weights are stored with their exponents coded (exact, allowed as coded_trained)"
    assert f"{lever.count} {how}" in plan.notes


def test_with_room_nothing_is_coded() -> None:
    model = tower()
    trained(model, "100MB", 1, allow=("coded_trained", "int8_trained"))
    assert not any(map(coded, model.modules()))


def test_in_8_bits_by_consent_the_least_is_lower_still() -> None:
    least = floor("int8_trained")
    assert least < floor("coded_trained") - 500_000
    model = tower()
    budget = int(1.01 * least)
    losses, measured = trained(model, budget, allow=("int8_trained",))
    peak = measured()
    assert peak == pytest.approx(model.memopt.plan.peak, abs=16)
    assert peak <= budget
    assert losses == pytest.approx(trained(tower(), None)[0], rel=1e-3)
    with pytest.raises(ValueError, match=r"allow='int8_trained' needs optimizer=\.\.\., the one that is to update"):
        memopt.compile(tower(), budget=1, allow=("int8_trained",))
    with pytest.raises(ValueError, match="'int8_trained' contradict each other"):
        memopt.compile(tower(), budget=1, allow=("int8_trained",), numerics="exact")


def test_no_more_are_coded_than_must_be_and_further_shapes_may_code_more() -> None:
    model, least = tower(), floor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"allow": ("int8_trained",), "lowering": "eager", "optimizer": optimizer}
    memopt.compile(model, budget=least - 50_000, example_inputs=(batch(),), **options)
    some = sum(map(coded, model.modules()))
    assert 0 < some < 8
    for rows in (32, 64):
        model(batch(rows=rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert some <= sum(map(coded, model.modules()))
    assert model.memopt.plan.peak <= least - 50_000


def test_with_states_and_gradients_elsewhere_too() -> None:
    """Pieces whose values are read while states come and go."""
    model, plain = tower(), tower()
    optimizer, theirs = (torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, plain))
    options: dict[str, Any] = {"allow": "coded_trained", "lowering": "eager", "disk_budget": "200MB"}
    least = floor_of(model, optimizer, **options)
    assert least < floor("coded_trained") - 4_000_000
    memopt.compile(model, budget=least, optimizer=optimizer, **options)
    for at in range(3):
        for each, stepping in ((model, optimizer), (plain, theirs)):
            each(batch(at)).backward()
            stepping.step()
            stepping.zero_grad()
    assert same(model, plain)
    assert any(map(coded, model.modules()))
    assert model.memopt.plan.peak <= least
    assert any("lie on disk" in note for note in model.memopt.plan.notes)


def test_a_copy_that_is_compiled_trains() -> None:
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    store_weights(model, optimizer)
    twin = copy.deepcopy(model)
    second = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    memopt.compile(twin, budget="1GB", optimizer=second, lowering="eager", numerics="exact")
    for each, stepping in ((model, optimizer), (twin, second)):
        each(batch()).backward()
        stepping.step()
    assert same(model, twin)
    weight = twin.layers[0].up.parametrizations.weight.original
    assert weight.untyped_storage().nbytes() == weight.element_size()


@pytest.mark.long
def test_a_saved_plan_codes_again_and_only_by_consent(tmp_path: Path) -> None:
    model, budget = tower(), int(1.01 * floor("coded_trained"))
    wanted, _ = trained(model, budget, allow=("coded_trained",))
    save_plan(model.memopt.plan, tmp_path / "plan.json")
    again = tower()
    got, _ = trained(again, budget, allow=("coded_trained",), plan_file=tmp_path / "plan.json")
    assert got == wanted
    assert sum(map(coded, again.modules())) == sum(map(coded, model.modules()))
    with pytest.raises(
        memopt.PlanFileError, match=r"packs trained weights \(coded_trained\), which this call does not"
    ):
        trained(tower(), budget, plan_file=tmp_path / "plan.json")


@pytest.mark.parametrize(
    "order", [*(pytest.param(each, marks=pytest.mark.long) for each in ("compiled", "planned")), "optimizer"]
)
def test_weights_in_8_bits_come_back_bit_for_bit_in_a_compiled_model(order: str, tmp_path: Path) -> None:
    """Loaded before the plan is made, after it, and the optimizer's part before the model's."""
    budget = int(1.01 * floor("int8_trained"))
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"allow": "int8_trained", "lowering": "eager"}

    def stepped(each: nn.Module, stepping: Any, at: int) -> float:
        loss = each(batch(at))
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        return loss.item()

    memopt.compile(model, budget=budget, optimizer=optimizer, **options)
    for at in range(2):
        stepped(model, optimizer, at)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    went_on = [stepped(model, optimizer, at) for at in (2, 3)]
    again = tower()
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-3)
    inputs = None if order == "compiled" else (batch(),)
    memopt.compile(again, budget=budget, optimizer=resumed, example_inputs=inputs, **options)
    loads = list(zip((again, resumed), torch.load(tmp_path / "checkpoint"), strict=True))
    for each, state in reversed(loads) if order == "optimizer" else loads:
        each.load_state_dict(state)
    assert [stepped(again, resumed, at) for at in (2, 3)] == went_on
    assert same(again, model)


def test_an_optimizers_checkpoint_of_another_model_leaves_the_weights() -> None:
    model, other = perceptron(), perceptron()
    first, second = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, other))
    for each, optimizer in ((model, first), (other, second)):
        store_weights(each, optimizer, "int8")
    ran(other, second)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first.load_state_dict(second.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_after_planning_the_optimizer_knows_before_the_first_step() -> None:
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    budget = floor_of(model, optimizer, allow="coded_trained", lowering="eager")
    memopt.compile(
        model, budget=budget, optimizer=optimizer, allow="coded_trained", lowering="eager", example_inputs=(batch(),)
    )
    assert any(map(coded, model.modules()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.zeros(p.shape, dtype=p.dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.long
def test_a_weight_that_leaves_its_codes_under_a_plan_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = tower(8), tower(8)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1.0) for each in (plain, model)]
    options: dict[str, Any] = {"allow": ("coded_trained",), "lowering": "eager", "numerics": "exact"}
    least = floor_of(model, optimizers[1], **options)
    memopt.compile(model, budget=least + 4096, optimizer=optimizers[1], **options)
    for at in range(5):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            loss = each(batch(at))
            loss.backward()
            up = each.layers[0].up
            held = up.parametrizations.weight.original if coded(up) else up.weight
            if at in (1, 2):
                held.grad = up.weight.detach().clone() if at == 1 else scattered(held)
            for group in optimizer.param_groups:
                group["lr"] = 1.0 if at in (1, 2) else 1e-2
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    assert "no longer coded" in caplog.text
    assert same(plain, model)
    assert model.layers[0].up.parametrizations.weight.original.is_contiguous()


@pytest.mark.long
def test_under_inductor_too() -> None:
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    budget = int(1.02 * floor_of(model, optimizer, allow="coded_trained", lowering="inductor"))
    losses, measured = trained(model, budget, allow="coded_trained", lowering="inductor")
    assert measured() == pytest.approx(model.memopt.plan.peak, rel=0.03)
    assert losses == pytest.approx(trained(tower(), None)[0], rel=1e-3)
    assert any(map(coded, model.modules()))
