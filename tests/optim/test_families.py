"""The optimizers of memopt.optim: their papers' equations, their bytes, their checkpoints, their company."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memopt import optim
from memopt.optim import apollo, galore, qgalore
from memopt.optim.photograph import photograph_optimizer
from memopt.optim.stored import Tables, rounded
from memopt.optim.subspace import Projected
from memopt.runtime.resident import distinct_bytes, resident_tensors
from memopt.runtime.trace import record
from memopt.timeline import peak
from tests.optim import transcribed as paper

STEPS = 50
TALL, WIDE, ROW = (24, 16), (12, 40), (40,)
LINEAR = [(code + 1) / 16 for code in range(16)]


@dataclass(frozen=True)
class Case:
    """build: the optimizer of a parameter; told: the transcription; wrong: an option it must notice; tolerance: of the
    distance travelled."""

    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    told: Callable[..., Tensor]
    options: dict[str, Any]
    wrong: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = (TALL, WIDE, ROW)
    tolerance: float = 1e-4


def blockwise(bits: int) -> dict[str, Any]:
    block = {8: 256, 4: 128}[bits]
    second = paper.dynamic_tree(8, False) if bits == 8 else LINEAR
    return {"first": paper.nearest(paper.dynamic_tree(bits, True), block), "second": paper.nearest(second, block)}


COMMON = {"lr": 1e-2, "weight_decay": 0.1}
LOW = {**COMMON, "rank": 4, "update_proj_gap": 20, "scale": 0.5}
TOLD = {"lr": 1e-2, "wd": 0.1}
TOLD_LOW = {**TOLD, "rank": 4, "gap": 20, "scale": 0.5}
BF16 = {"first": paper.stochastic_bf16(0), "second": paper.stochastic_bf16(1)}
MATRICES = (TALL, WIDE)
CASES = {
    "adamw": Case(lambda p: optim.AdamW(p, **COMMON), paper.adamw, TOLD, {"b2": 0.99}),
    "adamw_bf16": Case(
        lambda p: optim.AdamWBf16(p, **COMMON, least=0), paper.adamw, {**TOLD, **BF16}, {"first": BF16["second"]}
    ),
    "adamw8bit": Case(
        lambda p: optim.AdamW8bit(p, **COMMON, least=0),
        paper.adamw,
        {**TOLD, **blockwise(8)},
        {"second": paper.exactly},
    ),
    "adamw4bit": Case(
        lambda p: optim.AdamW4bit(p, **COMMON, least=0),
        paper.adamw,
        {**TOLD, **blockwise(4)},
        {"second": paper.exactly},
    ),
    "adafactor": Case(lambda p: optim.Adafactor(p, **COMMON), paper.adafactor, TOLD, {"wd": 0.2}),
    "muon": Case(lambda p: optim.Muon(p, **COMMON), paper.muon, TOLD, {"momentum": 0.8}, MATRICES, 0.01),
    "lomo": Case(
        lambda p: optim.Lomo(p, **COMMON, clip_value=1.0, in_backward=False),
        paper.lomo,
        {**TOLD, "clip": 1.0},
        {"clip": 1.1},
    ),
    "adalomo": Case(lambda p: optim.AdaLomo(p, **COMMON, in_backward=False), paper.adalomo, TOLD, {"wd": 0.2}),
    "galore": Case(lambda p: optim.GaLore(p, **LOW), paper.galore, TOLD_LOW, {"gap": 30}, MATRICES),
    "galore-reverse": Case(
        lambda p: optim.GaLore(p, **LOW, proj_type="reverse_std"),
        paper.galore,
        {**TOLD_LOW, "kind": "reverse_std"},
        {"kind": "std"},
        MATRICES,
    ),
    "galore8bit": Case(
        lambda p: optim.GaLore8bit(p, **LOW, least=0),
        paper.galore,
        {**TOLD_LOW, **blockwise(8)},
        {"second": paper.exactly},
        MATRICES,
    ),
    "natural_galore": Case(
        lambda p: optim.NaturalGaLore(p, **LOW, history=5, damping=1e-2),
        paper.natural_galore,
        {**TOLD_LOW, "history": 5, "damping": 1e-2},
        {"history": 4},
        MATRICES,
    ),
    "q_galore": Case(
        lambda p: optim.QGaLore(p, **{**LOW, "update_proj_gap": 4}, least=0, checks=2),
        paper.q_galore,
        {**TOLD_LOW, **blockwise(8), "gap": 4, "alike": 0.4, "checks": 2},
        {"alike": 1.0},
        MATRICES,
    ),
    "apollo": Case(
        lambda p: optim.Apollo(p, **LOW, seed=3), paper.apollo, {**TOLD_LOW, "seed": 3}, {"seed": 4}, MATRICES
    ),
    "apollo_mini": Case(
        lambda p: optim.ApolloMini(p, **{**LOW, "rank": 1}),
        paper.apollo,
        {**TOLD_LOW, "rank": 1, "seed": 0, "mini": True},
        {"mini": False},
        MATRICES,
    ),
    "frugal": Case(
        lambda p: optim.Frugal(p, **COMMON, density=0.25, scale=0.5, update_proj_gap=20),
        paper.frugal,
        {**TOLD, "density": 0.25, "gap": 20, "scale": 0.5, "seed": 0},
        {"gap": 30},
        MATRICES,
    ),
}


def drawn(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Gradients of very different sizes over the elements and of a common direction, as real ones are."""
    torch.manual_seed(sum(shape))
    size, mean = 10 ** (2 * torch.rand(shape) - 2), torch.randn(shape)
    return [size * (mean + torch.randn(shape)) for _ in range(count)]


def travelled(case: Case, shape: tuple[int, ...], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Where a parameter began and where the optimizer took it."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.randn(shape))
    began, optimizer = w.detach().double(), case.build([w])
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
        assert torch.equal(w.grad, g)
    return began, w.detach().double()


@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_are_those_of_the_paper(name: str) -> None:
    case = CASES[name]
    for shape in case.shapes:
        grads = drawn(shape, STEPS)
        began, found = travelled(case, shape, grads)
        wide = [g.double() for g in grads]
        error = (found - case.told(began, wide, **case.options)).norm() / (found - began).norm()
        other = (found - case.told(began, wide, **{**case.options, **case.wrong})).norm() / (found - began).norm()
        assert error < case.tolerance < 3 * case.tolerance < other, f"{shape}: off by {error:.2e}, {other:.2e} if wrong"


SIZE = (256, 64)  # 16,384 elements: 64 blocks of 256, 128 of 128
BYTES = {
    "adamw": 8 * 16384,
    "adamw_bf16": 4 * 16384,
    "adamw8bit": 2 * (16384 + 4 * 64),
    "adamw4bit": 2 * (8192 + 4 * 128),
    "adafactor": 4 * (256 + 64),
    "muon": 4 * 16384,
    "lomo": 0,
    "adalomo": 4 * (256 + 64),
    "galore": 8 * 4 * 256 + 4 * 4 * 64,
    "galore8bit": 2 * (1024 + 4 * 4) + 4 * 4 * 64,
    "natural_galore": (8 + 4 * 5) * 4 * 256 + 4 * 4 * 64,
    "q_galore": 2 * (1024 + 4 * 4) + (128 + 5) + 4 * 64 + 4 * (2 + 2),
    "apollo": 8 * 4 * 256 + 4,
    "apollo_mini": 8 * 256 + 4,
    "frugal": 8 * 256 * 16,
}
STEP_COUNT = 4


@pytest.mark.parametrize("name", BYTES)
def test_state_bytes_are_as_stated_and_the_step_is_predicted(name: str) -> None:
    p = nn.Parameter(torch.randn(SIZE))
    p.grad = torch.randn(SIZE)
    optimizer = CASES[name].build([p])
    if isinstance(optimizer, Projected):
        optimizer.param_groups[0]["update_proj_gap"] = 1  # as in the photographed step, each makes its projection anew
    optimizer.step()
    phase = photograph_optimizer([("p", p)], optimizer)
    counted = 0 if name == "muon" else STEP_COUNT
    assert phase.state_bytes == BYTES[name] + counted
    assert distinct_bytes(resident_tensors(list(optimizer.state.values()))) == BYTES[name] + counted
    if name == "muon":
        return  # products of bf16 matrices take a workspace inside themselves on CPU
    held = distinct_bytes(resident_tensors(optimizer, [p.grad]))
    assert peak(phase.graph()) == pytest.approx(held + record(optimizer.step).peak(), abs=2048)


@pytest.mark.parametrize("name", ["galore", "galore-reverse", "galore8bit", "natural_galore", "q_galore", "apollo"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_a_bf16_gradient_is_projected_some_rows_at_a_time(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of it in fp32 is held, and it moves the parameter as its fp32 copy would."""
    grads, found = [g.bfloat16() for g in drawn(shape, 5)], []
    for dtype, wide in ((torch.float32, 1 << 22), (torch.bfloat16, 7 * shape[1])):
        monkeypatch.setattr("memopt.optim.subspace.WIDE", wide)
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(shape))
        optimizer = CASES[name].build([p])
        for g in grads:  # not by `.grad`, which has the parameter's type
            optimizer.update_one(p.data, g.to(dtype), optimizer.param_groups[0])
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on_left", [True, False])
def test_lengths_of_a_bf16_matrix_are_those_of_all_its_rows(on_left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memopt.optim.subspace.WIDE", 7 * 24)
    matrix = torch.randn(40, 24).bfloat16()
    torch.testing.assert_close(apollo._lengths(matrix, on_left), apollo._lengths(matrix.float(), on_left))


@pytest.mark.parametrize("name", ["galore", "apollo", "apollo_mini"])
def test_the_step_of_a_bf16_parameter_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memopt.optim.subspace.WIDE", 1 << 14)
    p = nn.Parameter(torch.randn(512, 384).bfloat16())
    p.grad = torch.randn_like(p)
    optimizer = CASES[name].build([p])
    optimizer.param_groups[0]["update_proj_gap"] = 1
    optimizer.step()
    held = distinct_bytes(resident_tensors(optimizer, [p.grad]))
    measured = held + record(optimizer.step).peak()
    assert peak(photograph_optimizer([("p", p)], optimizer).graph()) == pytest.approx(measured, abs=4096)
    if name != "galore":  # whose Gram matrix is larger
        assert measured < held + 2 * p.nbytes  # an fp32 copy of the gradient and anything more


def test_temporaries_are_bounded_by_chunks() -> None:
    p = nn.Parameter(torch.randn(1024, 1024))  # 4 MiB
    p.grad = torch.randn(1024, 1024)
    for name in ("adamw", "adamw_bf16", "adamw8bit", "adamw4bit", "lomo", "adalomo"):
        optimizer = CASES[name].build([p])
        optimizer.step()
        assert record(optimizer.step).peak() < 2.5 * 2**20, name


def small_model() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16))
    return model, [
        {"params": [model[0].weight, model[2].weight]},
        {"params": [model[0].bias, model[2].bias], "lr": 1e-3},
    ]


def built(name: str, groups: list[Any]) -> torch.optim.Optimizer:
    return CASES[name].build(groups[:1] if name == "muon" else groups)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Tensor]:
    """Steps first..last with a loss that depends on the step's number."""
    for step in range(first, last):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at", [0, 1, 21])
def test_a_run_resumed_at_any_step_is_the_same_run(name: str, at: int) -> None:
    model, groups = small_model()
    want = trained(model, built(name, groups), 0, 24)
    model, groups = small_model()
    optimizer = built(name, groups)
    trained(model, optimizer, 0, at)
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    model, groups = small_model()
    model.load_state_dict(weights)
    optimizer = built(name, groups)
    optimizer.load_state_dict(state)
    assert all(map(torch.equal, trained(model, optimizer, at, 24), want))


@pytest.mark.parametrize("name", CASES)
def test_schedulers_clipping_accumulation_and_scaling_work(name: str) -> None:
    model, groups = small_model()
    optimizer = built(name, groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(64, 12)
    losses = []
    for _ in range(40):
        for half in x.chunk(2):
            loss = model(half).square().mean() / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_adamw_and_torchs_take_over_from_each_other() -> None:
    model, groups = small_model()
    torchs = torch.optim.AdamW(groups, **COMMON)
    trained(model, torchs, 0, 5)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, deepcopy(torchs.state_dict())
    want = trained(model, torchs, 5, 9)

    model, groups = small_model()
    model.load_state_dict(weights)
    ours = optim.AdamW(groups, **COMMON)
    ours.load_state_dict(state)
    for got, wanted in zip(trained(model, ours, 5, 9), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    back = torch.optim.AdamW(groups, **COMMON)
    back.load_state_dict(ours.plain_state_dict())
    assert set(back.param_groups[0]) == set(torchs.param_groups[0])
    found = [state["exp_avg_sq"] for state in back.state.values()]
    assert all(map(torch.equal, found, (state["exp_avg_sq"] for state in ours.state.values())))


@pytest.mark.parametrize(("name", "share"), [("adamw_bf16", 0.004), ("adamw8bit", 0.015), ("adamw4bit", 0.2)])
def test_moments_taken_over_are_off_by_their_rounding_alone(name: str, share: float) -> None:
    model, groups = small_model()
    torchs = torch.optim.AdamW(groups, **COMMON)
    trained(model, torchs, 0, 5)
    ours = built(name, groups)
    ours.load_state_dict(torchs.state_dict())
    decoded = ours.plain_state_dict()["state"]  # type: ignore[attr-defined]
    for at, state in enumerate(torchs.state.values()):
        error = (decoded[at]["exp_avg"] - state["exp_avg"]).norm() / state["exp_avg"].norm()
        assert 0 < error < share


@pytest.mark.parametrize("damage", ["foreign", "cut", "missing", "plain"])
def test_a_damaged_or_foreign_checkpoint_changes_nothing(damage: str) -> None:
    model, groups = small_model()
    optimizer = CASES["adamw8bit"].build(groups)
    trained(model, optimizer, 0, 3)
    good = optimizer.state_dict()
    bad = {**good, "state": {at: dict(state) for at, state in good["state"].items()}}
    if damage == "foreign":
        bad["state"][1] = {"step": torch.tensor(3.0), "momentum_buffer": torch.zeros(24)}
    elif damage == "missing":
        del bad["state"][3]["exp_avg_sq"]
    else:
        bad["state"][3]["exp_avg"] = torch.zeros(7, dtype=torch.uint8 if damage == "cut" else torch.float32)
    before = [tensor.clone() for tensor in resident_tensors(list(optimizer.state.values()))]
    with pytest.raises(ValueError, match=r"the state of parameter \d is not one of AdamW8bit.*nothing was changed"):
        optimizer.load_state_dict(bad)
    assert all(map(torch.equal, before, resident_tensors(list(optimizer.state.values()))))


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_not_finite() -> None:
    x = torch.full((1 << 16,), 1.0 + 0.3 * 2**-7)
    drawn = rounded(x, seed=5, start=0).double()
    assert set(drawn.tolist()) == {1.0, 1.0 + 2**-7}
    assert float((drawn.mean() - 1) * 2**7) == pytest.approx(0.3, abs=0.01)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    assert torch.equal(rounded(odd, 1, 0)[[0, 1, 3]], odd[[0, 1, 3]].bfloat16())
    assert rounded(odd, 1, 0)[2].isnan()


@pytest.mark.parametrize("count", [1, 255, 256, 700])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_a_projector_in_four_bits_is_off_by_half_a_step(count: int, shift: float) -> None:
    """Also where all of a group's elements are of one sign, and where the last group is not full."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) + shift
    stored = torch.zeros(qgalore.nbytes(count), dtype=torch.uint8)
    qgalore.encode(x, stored)
    error = (qgalore.decode(stored, count) - x).abs()
    for at in range(0, count, 256):
        group = torch.cat((x[at : at + 256], torch.zeros(1)))
        step = (group.max() - group.min()) / 15
        assert error[at : at + 256].max() <= 1.01 * step  # rounding z moves the ends of a range by half a step
        assert error[at : at + 256].median() <= 0.51 * step
    qgalore.encode(torch.zeros(count), stored)
    assert not qgalore.decode(stored, count).any()


def test_a_gap_grows_only_where_the_space_stays() -> None:
    """A gradient that stays where it is, and one whose first direction is another each time."""

    def gaps(grads: Callable[[int], Tensor]) -> float:
        p = nn.Parameter(torch.zeros(8, 32))
        optimizer = optim.QGaLore([p], rank=2, update_proj_gap=3, checks=2)
        for step in range(13):  # projectors before updates 0, 3, 6 (then 12) or 0, 3, 6, 9, 12
            p.grad = grads(step)
            optimizer.step()
        return float(optimizer.state[p]["rhythm"][0])

    axis = torch.eye(8)
    assert gaps(lambda step: axis[0][:, None] + 0.01 * torch.randn(8, 32)) == 12
    assert gaps(lambda step: axis[step // 3][:, None] + 0.01 * torch.randn(8, 32)) == 3


def test_lomo_updates_in_backward_and_leaves_no_gradient() -> None:
    model, groups = small_model()
    optimizer = optim.AdaLomo(groups, lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 12)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert not any(map(torch.equal, before, model.parameters()))
    optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0] * 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: optim.AdamW(p, state="int3"), "state='int3' is not known; known are fp32, bf16, int8, int4"),
        (lambda p: optim.AdamW(p, lr=-1.0), "lr=-1.0 refused"),
        (lambda p: optim.GaLore([{"params": p, "rank": 4, "proj_type": "full"}]), "proj_type='full' is not known"),
        (lambda p: optim.Apollo(p, rank=0), "rank=0 refused"),
        (lambda p: optim.Frugal(p, density=1.5), "density=1.5 refused"),
        (lambda p: optim.GaLore(p, ranks=4), "ranks is no option of GaLore"),
        (lambda p: optim.GaLore(p, history=4), "history is no option of GaLore"),
        (lambda p: optim.NaturalGaLore(p, rank=4, history=0), "history=0 refused"),
        (lambda p: optim.NaturalGaLore(p, rank=4, damping=0.0), "damping=0.0 refused"),
        (lambda p: optim.QGaLore(p, rank=4, alike=1.5), "alike=1.5 refused"),
        (lambda p: optim.QGaLore(p, rank=4, checks=0), "checks=0 refused"),
    ],
)
def test_options_that_make_no_sense_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([nn.Parameter(torch.zeros(4, 4))])


def test_channels_last_and_bf16_parameters_are_updated_like_others() -> None:
    w, g = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    plain, turned = nn.Parameter(w.clone()), nn.Parameter(w.to(memory_format=torch.channels_last))
    for p in (plain, turned):
        p.grad = g.clone()
        for name in ("adamw", "adalomo"):
            CASES[name].build([p]).step()
    torch.testing.assert_close(plain, turned, rtol=1e-6, atol=1e-7)
    narrow = nn.Parameter(w.bfloat16())
    narrow.grad = g.bfloat16()
    optimizer = CASES["adamw8bit"].build([narrow])
    optimizer.step()
    assert narrow.dtype is torch.bfloat16
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.uint8}


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])
def test_codes_are_those_of_the_nearest_value(bits: int, signed: bool) -> None:
    """Also on the edges between two values and a float beside them: the search by upper bits is torch's."""
    tables = Tables.of(bits, signed, torch.device("cpu"))
    edges = tables.edges[:-1]
    beside = [torch.nextafter(edges, edges + way) for way in (1, -1)]
    x = torch.cat([torch.randn(4096).clamp(-1, 1), 10 ** (-8 * torch.rand(4096)), edges, *beside, torch.zeros(1)])
    x = x if signed else x.abs()
    assert torch.equal(tables.codes(x).int(), torch.bucketize(x, edges, out_int32=True))


@pytest.mark.parametrize("rank_of_gradient", [0, 4, 40])
@pytest.mark.parametrize("on_left", [False, True])
@pytest.mark.parametrize("shape", [(256, 40), (40, 256)])
def test_projectors_are_orthonormal_whatever_the_gradient(
    shape: tuple[int, int], on_left: bool, rank_of_gradient: int
) -> None:
    torch.manual_seed(0)
    g = torch.randn(shape[0], rank_of_gradient) @ torch.randn(rank_of_gradient, shape[1])
    found = galore.singular_vectors(g, on_left, 16)
    assert torch.allclose(found.mT @ found, torch.eye(16), atol=1e-5)
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    wanted = (u if on_left else vt.mT)[:, : min(16, rank_of_gradient)].float()
    assert torch.allclose(found @ (found.mT @ wanted), wanted, atol=1e-4)


def test_a_gap_of_none_is_photographed_where_nothing_is_projected() -> None:
    p = nn.Parameter(torch.randn(64, 64))
    optimizer = optim.GaLore([{"params": [p], "update_proj_gap": None}])
    assert photograph_optimizer([("p", p)], optimizer).steps


@pytest.mark.parametrize("kind", [optim.GaLore, optim.QGaLore, optim.NaturalGaLore])
def test_the_photographed_step_makes_every_projection_anew(kind: type[optim.GaLore]) -> None:
    """Whatever the gaps of the groups: the budget is to hold in such a step too."""

    def decompositions(*gaps: int) -> int:
        params = [nn.Parameter(torch.randn(64, 32)) for _ in gaps]
        groups = [{"params": [p], "rank": 4, "update_proj_gap": gap} for p, gap in zip(params, gaps, strict=True)]
        phase = photograph_optimizer([(f"p{at}", p) for at, p in enumerate(params)], kind(groups))
        return sum("eigh" in step.op for step in phase.steps)

    assert decompositions(200) == 1
    assert decompositions(7, 200, 13) == 3
