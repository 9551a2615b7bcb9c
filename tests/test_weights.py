"""Frozen weights in fewer bits: what is packed, what it is read as, checkpoints, and the budget held with adapters."""

from __future__ import annotations

import copy
import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt.api import make_request
from memopt.devices import device
from memopt.kernels import nf4
from memopt.lighter import lessened
from memopt.planfile import save_plan
from memopt.refusal import Refused
from memopt.runtime import disk
from memopt.runtime.measure import measure_step
from memopt.weights import LEAST, pack_weights, packable, packed, packed_twin, unpack_weights

PLAIN: dict[str, Any] = {"lowering": "eager", "passes": "-stream,-stream_attention"}  # each is a capture of its own
WIDTH, WORDS, BATCH, SEQ = 64, 80, 1, 16
# QLoRA's levels, arXiv:2305.14314, appendix E
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Adapted(nn.Module):
    """A frozen matrix and a trained product of rank 4 beside it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(inner, 4, bias=False), nn.Linear(4, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Tower(nn.Module):
    """Embedding, adapted layers, a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.Sequential(Adapted(WIDTH, 2 * WIDTH), nn.GELU(), Adapted(2 * WIDTH, WIDTH)) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, WORDS).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def tower(depth: int = 3) -> Tower:
    torch.manual_seed(0)
    return Tower(depth)


def ids() -> Tensor:
    return torch.randint(0, WORDS, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def read_as(model: nn.Module) -> nn.Module:
    """The plain model with the packed weights as they are read."""
    plain = tower(len(model.layers))  # type: ignore[arg-type]
    plain.load_state_dict(model.state_dict())
    return plain


def test_the_levels_are_the_papers() -> None:
    assert nf4.levels() == pytest.approx(LEVELS, abs=1e-6)


@pytest.mark.parametrize("count", [1, nf4.BLOCK - 1, nf4.BLOCK, 5 * nf4.BLOCK + 3, nf4.EACH * nf4.BLOCK + 65])
def test_each_value_is_read_as_the_level_nearest_to_it(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    made = nf4.pack(x)
    assert made.numel() == nf4.nbytes(count)
    back = torch.empty_like(x)
    nf4.unpack(made, back)
    size = nf4.sizes(made).repeat_interleave(nf4.BLOCK)[:count]
    offered = torch.tensor(nf4.levels()) * size[:, None]
    assert torch.equal(back, offered.gather(1, (offered - x[:, None]).abs().argmin(1, keepdim=True))[:, 0])
    largest = torch.stack([block.abs().max() for block in x.split(nf4.BLOCK)])
    spread = float((largest - largest.mean()).abs().max())
    assert float((nf4.sizes(made) - largest).abs().max()) <= spread / 16 + 1e-6  # half a step of e4m3's three bits


def test_zeros_and_blocks_far_below_the_rest_come_back_small() -> None:
    x = torch.cat((torch.zeros(nf4.BLOCK), torch.full((nf4.BLOCK,), 1e-6), torch.randn(nf4.BLOCK)))
    back = torch.empty_like(x)
    nf4.unpack(nf4.pack(x), back)
    assert bool(back.isfinite().all())
    assert torch.equal(back[: nf4.BLOCK], torch.zeros(nf4.BLOCK))


def test_bits_an_element_are_the_papers() -> None:
    """4 + 8 / 64 + 32 / (64 * 256), QLoRA, section 3."""
    count = 1 << 24
    assert 8 * (nf4.nbytes(count) - 4) / count == 4 + 8 / 64 + 32 / (64 * 256)


def test_what_is_packed_is_frozen_and_one_layers_own() -> None:
    model = tower(1)
    model.layers[0][2].base.weight.requires_grad_(True)
    assert list(packable(model)) == ["layers.0.0.base.weight"]
    model.again = nn.Linear(1, 1)
    model.again.weight = model.layers[0][0].base.weight
    assert not packable(model)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_packing_says_its_bytes_and_changes_no_key(codec: str) -> None:
    model = tower()
    keys = list(model.state_dict())
    done = pack_weights(model, codec)
    assert done.before == 6 * 2 * WIDTH * WIDTH * 4
    held = sum(b.nbytes for name, b in model.named_buffers() if "parametrizations" in name)
    assert held == done.after < done.before / (7 if codec == "nf4" else 3.8)
    assert sorted(model.state_dict()) == sorted(keys)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    model.requires_grad_(True)  # what is stored is no parameter, so this goes


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_a_checkpoint_of_packed_weights_goes_anywhere_and_comes_back_bit_for_bit(codec: str) -> None:
    model = tower()
    pack_weights(model, codec)
    plain, saved = read_as(model), model.state_dict()
    assert torch.equal(plain(ids()), model(ids()))
    held = {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(saved)
    assert all(torch.equal(held[name], b) for name, b in model.named_buffers())
    other = tower()
    pack_weights(other, codec)
    with torch.no_grad():
        plain.layers[0][0].base.weight.mul_(-2)
    other.load_state_dict(plain.state_dict())
    assert torch.allclose(other(ids()), plain(ids()), rtol=0.1)
    again = copy.deepcopy(model)
    assert torch.equal(again(ids()), model(ids()))


def test_weights_of_another_shape_are_refused_and_none_is_lost() -> None:
    model = tower(1)
    pack_weights(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {**before, "layers.0.0.base.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.0\.base"):
        model.load_state_dict(wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unpacked_weights_are_parameters_again() -> None:
    model = tower()
    pack_weights(model)
    loss, state = model(ids()), model.state_dict()
    names = unpack_weights(model)
    assert len(names) == 6
    assert not any(packed(module) for module in model.modules())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tower().named_parameters()}
    assert torch.equal(model(ids()), loss)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.layers[0][0].base.weight.zero_()  # and written into
    assert not bool(model.layers[0][0].base.weight.any())


def test_what_cannot_be_packed_is_refused_and_nothing_changed() -> None:
    with pytest.raises(ValueError, match="codec='int3' is not known; known are int8, nf4"):
        pack_weights(tower(), "int3")
    with pytest.raises(ValueError, match=f"no frozen matrix of {LEAST} elements or more"):
        pack_weights(nn.Linear(256, 256))
    model = tower()
    with torch.no_grad():
        model.layers[2][0].base.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.2\.0\.base\.weight is not finite"):
        pack_weights(model)
    assert not any(packed(module) for module in model.modules())


def measured(model: nn.Module, budget: Any, **options: Any) -> tuple[Any, int]:
    """The plan of a step of AdamW over the adapters, and the measured peak of one."""
    optimizer, inputs = torch.optim.AdamW(trained(model), lr=1e-3), ids()
    memopt.compile(model, budget=budget, optimizer=optimizer, example_inputs=(inputs,), **{**PLAIN, **options})
    found = measure_step(lambda: model(inputs), optimizer, resident=[model, inputs])
    return model.memopt.plan, found.peak_bytes  # type: ignore[union-attr]


def least(model: nn.Module, **options: Any) -> int:
    """The floor of the same step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refused, "ways_out", lambda self: ())  # each of them is a plan of its own
        with pytest.raises(memopt.BudgetError) as refused:
            measured(model, 1, **options)
    assert refused.value.floor_bytes is not None
    return refused.value.floor_bytes


@cache
def plain_floor() -> int:
    """Of four layers whose weights are as they were."""
    return least(tower(4))


def test_a_step_with_packed_weights_holds_less_than_any_plan_of_the_plain_one() -> None:
    plain, model = plain_floor(), tower(4)
    pack_weights(model)
    floor = least(model)
    assert floor < 0.7 * plain
    plan, peak = measured(model, int(floor * 1.02))
    assert peak == plan.peak <= 1.02 * floor


def test_gradients_are_those_of_the_weights_as_they_are_read() -> None:
    model = tower()
    pack_weights(model)
    plain = read_as(model)
    plain(ids()).backward()
    floor = least(model, numerics="exact")
    memopt.compile(model, budget=int(floor * 1.05), **PLAIN, numerics="exact")
    model(ids()).backward()
    assert model.memopt.plan.plan.chosen  # type: ignore[union-attr]
    want, got = gradients(plain), gradients(model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_by_consent_the_planner_packs_where_nothing_else_fits() -> None:
    floor = plain_floor()
    roomy, peak = measured(tower(4), int(1.1 * floor), allow="nf4_weights")
    assert peak == roomy.peak
    assert not any(lever.lever == "nf4_weights" for lever in roomy.levers)
    model = tower(4)
    plan, peak = measured(model, int(0.75 * floor), allow="nf4_weights")
    assert peak == plan.peak <= 0.75 * floor
    lever = next(each for each in plan.levers if each.lever == "nf4_weights")
    assert lever.numerics == "lossy"
    assert plan.baseline_peak > floor
    assert any("nf4" in note for note in plan.notes)


@pytest.mark.long
def test_the_least_lossy_way_that_fits_is_taken() -> None:
    floor = plain_floor()
    plan, _ = measured(tower(4), int(0.9 * floor), allow=("nf4_weights", "int8_weights"))
    (lever,) = (each for each in plan.levers if each.lever.endswith("_weights"))
    assert lever.lever == "int8_weights"
    assert lever.count < 8  # no more than must be


@pytest.mark.long
def test_where_nothing_fits_the_floor_is_that_of_all_weights_in_the_fewest_bits() -> None:
    model = tower(4)
    pack_weights(model, "nf4")
    assert least(tower(4), allow=("int8_weights", "nf4_weights")) == least(model)


def test_planning_leaves_the_model_as_it_is() -> None:
    model, options = tower(4), {**PLAIN, "allow": "nf4_weights"}
    floor = plain_floor()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = memopt.plan(model, (ids(),), budget=int(0.75 * floor), **options)
    assert any(lever.lever == "nf4_weights" for lever in found.levers)
    assert not any(packed(module) for module in model.modules())
    least(model, **options)
    assert not any(packed(module) for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.long
def test_an_optimizer_over_everything_keeps_no_frozen_weight() -> None:
    floor, model = plain_floor(), tower(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {**PLAIN, "allow": "nf4_weights", "example_inputs": (ids(),)}
    memopt.compile(model, budget=int(0.75 * floor), optimizer=optimizer, **options)
    found = measure_step(lambda: model(ids()), optimizer, resident=[model, optimizer])
    assert found.peak_bytes <= 0.75 * floor
    held = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    assert held < sum(p.nbytes for p in tower(4).parameters()) / 2


@pytest.mark.long
def test_a_saved_plan_packs_again_and_only_by_consent(tmp_path: Any) -> None:
    floor, path = plain_floor(), tmp_path / "plan.json"
    options: dict[str, Any] = {"allow": "nf4_weights"}
    plan, peak = measured(tower(4), int(0.75 * floor), **options)
    save_plan(plan, path)
    again, same = measured(tower(4), int(0.75 * floor), plan_file=path, **options)
    chosen, before = ([(r.trade, r.value, r.span) for r in found.plan.chosen] for found in (again, plan))
    assert (chosen, same) == (before, peak)
    with pytest.raises(
        memopt.PlanFileError, match=r"packs frozen weights \(nf4_weights\), which this call does not allow"
    ):
        measured(tower(4), int(0.75 * floor), plan_file=path)


def test_a_refusal_names_it_as_a_way_out() -> None:
    floor = plain_floor()
    with pytest.raises(memopt.BudgetError) as refused:
        measured(tower(4), int(0.75 * floor))
    way = next(way for way in refused.value.ways_out if way.change == 'allow=("nf4_weights",)')
    assert way.fits
    assert way.numerics == "lossy"


def on_disk(model: nn.Module, share: float, folder: Any, **options: Any) -> tuple[Any, int]:
    """A plan in this share of the plain floor, with room on disk."""
    budget = int(share * plain_floor())
    return measured(model, budget, disk_budget="10MB", disk_path=folder, **{"numerics": "exact", **options})


def test_weights_on_disk_need_no_consent_and_change_no_bit(tmp_path: Any) -> None:
    model = tower(4)
    plan, peak = on_disk(model, 0.75, tmp_path)
    assert peak == plan.peak <= 0.75 * plain_floor()
    lever = next(each for each in plan.levers if each.lever == "weights_on_disk")
    assert lever.numerics == "exact"
    plain, first = read_as(model), tower(4).state_dict()
    frozen = [key for key in first if "base" in key]
    assert all(torch.equal(model.state_dict()[key], first[key]) for key in frozen)
    for each in (model, plain):
        each.zero_grad()
        each(ids()).backward()
    want, got = gradients(plain), gradients(model)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert want.keys() == got.keys()


def test_what_weights_take_on_disk_no_activation_can(tmp_path: Any) -> None:
    request = make_request(
        device("cpu"), "1GB", None, (), "exact", "eager", "", 1, "m", disk_budget="10MB", disk_path=tmp_path
    )
    ((lever, codec),) = request.weights
    assert lever == "weights_on_disk"
    model = tower()
    left = lessened(request, model, packed_twin(model, codec)[1])
    assert left.disk == (10_000_000 - 6 * 2 * WIDTH * WIDTH * 4, codec)
    assert not left.weights


@pytest.mark.long
def test_weights_take_no_more_disk_than_there_is_and_can_be_switched_off(tmp_path: Any) -> None:
    """A quarter of the weights' bytes; switched off, nothing of them."""
    room: dict[str, Any] = {"disk_budget": 2 * 2 * WIDTH * WIDTH * 4 + 100, "disk_path": tmp_path}
    floor, least_of = plain_floor(), least(tower(4), **room)
    assert 0.75 * floor < least_of < 0.95 * floor
    plan, peak = measured(tower(4), least_of, **room)
    assert peak == plan.peak
    assert next(each.count for each in plan.levers if each.lever == "weights_on_disk") == 2
    off = PLAIN["passes"] + ",-weights_on_disk"
    assert least(tower(4), **room, passes=off) > least_of


def test_a_disk_that_fails_while_weights_are_written_leaves_the_model_as_it_was(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, model = disk.use(tmp_path, 1 << 20), tower(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    put, written = pool.put, [0]

    def full(data: memoryview, offset: int) -> None:
        written[0] += 1
        if written[0] > 3:
            raise disk.DiskError("no space left")
        put(data, offset)

    monkeypatch.setattr(pool, "put", full)
    own = dict(model.named_parameters())
    with pytest.raises(disk.DiskError, match="no space left"):
        pack_weights(model, pool.codec)
    assert written[0] == 4
    assert all(p is own[name] for name, p in model.named_parameters())
    assert not any(packed(module) for module in model.modules())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tower(4).named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pool.held == 0


def test_a_copy_is_unpacked_by_itself() -> None:
    model = tower()
    pack_weights(model)
    loss, other = model(ids()), copy.deepcopy(model)
    unpack_weights(other)
    assert torch.equal(other(ids()), loss)
    assert torch.equal(model(ids()), loss)
    assert len(unpack_weights(model)) == 6
    assert torch.equal(model(ids()), loss)


def test_a_model_that_is_converted_reads_its_weights_converted() -> None:
    model = tower()
    pack_weights(model)
    model.to(torch.bfloat16)
    assert model.layers[0][0].base.weight.dtype is torch.bfloat16
    model(ids()).backward()


def test_weights_on_disk_outlive_a_move_of_their_layer(tmp_path: Any) -> None:
    pool, model = disk.use(tmp_path, 1 << 20), tower()
    want = model(ids())
    pack_weights(model, pool.codec)
    for module in model.modules():  # as `.cuda()` replaces buffers
        module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
    assert torch.equal(model(ids()), want)
    del model
    gc.collect()
    assert pool.held == 0


def test_an_optimizer_gets_empty_parameters_and_others_keep_the_weight() -> None:
    model, options = tower(4), {**PLAIN, "allow": "nf4_weights", "example_inputs": (ids(),)}
    weight = model.layers[0][0].base.weight
    before, optimizer = weight.clone(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    memopt.compile(model, budget=int(0.75 * plain_floor()), optimizer=optimizer, **options)
    assert torch.equal(weight, before)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(p is weight for p in held)
    assert len(held) == len(list(tower(4).parameters()))
    model(ids()).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.long
def test_a_longer_batch_packs_what_a_shorter_one_left() -> None:
    model = tower(4)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    memopt.compile(model, budget=int(0.97 * plain_floor()), optimizer=optimizer, **PLAIN, allow="nf4_weights")
    counts = []
    for rows in (1, 2):
        model(ids().expand(rows, -1)).backward()
        optimizer.zero_grad()
        (lever,) = (each for each in model.memopt.plan.levers if each.lever == "nf4_weights")  # type: ignore[union-attr]
        assert lever.count == sum(packed(module) for module in model.modules())
        counts.append(lever.count)
    assert 0 < counts[0] < counts[1]
