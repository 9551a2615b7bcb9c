"""Models sharded by torch's fully_shard (ZeRO-3): real processes of a gloo group beside fully_shard and one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt
from memopt.errors import BudgetError
from memopt.gathered import Gathered
from memopt.optim import AdamW8bit, GaLore, Lomo
from memopt.refusal import Refused
from memopt.runtime.rows import MEAN_ROWS, Mesh, known_as, workspace
from memopt.runtime.trace import record
from memopt.units import format_size
from tests.optim.ranks import STEPS, Net, batch, net, outlived, spawned, train

ADAMW = torch.optim.AdamW
CLOSE = {"rtol": 1e-3, "atol": 2e-3}  # as in test_sharded.py: sums in another order


class Checkpointed(Net):
    """With regions within its forward."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + checkpoint(layer.__call__, x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def sharded(ranks: int, copies: int = 1, kind: type[Net] = Net, **options: Any) -> Net:
    """The classifier with fully_shard on each layer and on the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = kind()
    shape = (ranks,) if copies == 1 else (copies, ranks // copies)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "rows")[-len(shape) :])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, on every rank, under the plain model's names."""
    return {key: value.full_tensor().clone() for key, value in model.state_dict().items()}


def compiled(model: nn.Module, budget: int | str, optimizer: torch.optim.Optimizer, **options: Any) -> nn.Module:
    options = {"numerics": "exact", "example_inputs": batch(0), **options}
    return memopt.compile(model, budget, optimizer=optimizer, **options)


def least(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> int:
    """The floor that a refusal tells."""
    Refused.ways_out = lambda self: ()  # type: ignore[method-assign]  # each is a plan of its own; this process ends
    with pytest.raises(BudgetError) as refused:
        compiled(model, 1, optimizer, **options)
    return refused.value.floor_bytes or 0


def everything(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Equal batches at the least budget; then batches of one's own, by memopt and by fully_shard itself, clipped."""
    model = sharded(ranks)
    kinds = [type(module) for module in model.modules()]
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    floor = least(model, optimizer)
    assert [type(module) for module in model.modules()] == kinds, "a refusal gives the model back as it was"
    model = compiled(model, floor, optimizer)
    found: dict[str, Any] = {"losses": train(model, optimizer, [batch(step) for step in range(STEPS)])}
    plan, took = model.memopt.plan, model.memopt.measured
    found |= {"whole": whole(model), "peaks": (plan.peak, took.peak_bytes, floor), "report": model.memopt.report()}
    for name in ("plain", "memopt"):
        model = sharded(ranks)
        optimizer = ADAMW(model.parameters(), lr=1e-2)
        if name == "memopt":
            model = compiled(model, floor, optimizer)
        losses = []
        for step in range(STEPS):
            loss = model(*batch(step, rank))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((float(loss.detach()), float(norm.full_tensor())))
        found[name] = losses, whole(model)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    return spawned(everything, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks found."""
    return spawned(everything, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("ranks", ["two", pytest.param("four", marks=pytest.mark.long)])
def test_equal_batches_train_as_one_process_does(ranks: str, request: pytest.FixtureRequest) -> None:
    """The mean of 2 or 4 equal gradients is exact, so every bit must agree, and the budget is held."""
    model = net()
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, [batch(step) for step in range(STEPS)])
    every = request.getfixturevalue(ranks)
    for one in every:
        assert one["losses"] == losses
        assert one["whole"].keys() == model.state_dict().keys()
        assert all(torch.equal(one["whole"][key], value) for key, value in model.state_dict().items())
        predicted, measured, floor = one["peaks"]
        assert measured <= predicted <= floor
    assert every[0]["peaks"][0] == every[0]["peaks"][1]  # it has the most rows


def test_the_report_tells_what_a_rank_has_and_sends(two: list[dict[str, Any]]) -> None:
    told = re.search(
        r"sharded by fully_shard: (\S+) KB \S+ KiB. of (\S+) KB .* (\d+) times a parameter is gathered, (\d+) of them "
        r"again for the backward; a rank sends (\S+) KB",
        " ".join(two[0]["report"].split()),
    )
    assert told is not None, two[0]["report"]
    assert "parametrizations" not in two[0]["report"], "tensors go by the user's names"
    here, every, times, again, sent = map(float, told.groups())
    params = [p.numel() * 4 for p in net().parameters()]
    assert every == pytest.approx(sum(params) / 1e3, abs=0.01)
    assert here == pytest.approx(
        sum(-(-p.shape[0] // 2) * p[0].numel() * 4 for p in net().parameters()) / 1e3, abs=0.01
    )
    assert times == len(params) + again
    assert again >= 3, "at the least budget whole weights are not kept for the backward"
    assert sum(params) < sent * 1e3 <= 0.51 * (2 * sum(params) + again * max(params))


def test_it_trains_as_fully_shard_does(two: list[dict[str, Any]]) -> None:
    """Also clipped by torch's own function, whose norm is that of all ranks. Two terms have one sum."""
    for one in two:
        (losses, parameters), (mine, own) = one["plain"], one["memopt"]
        assert mine == losses
        assert all(torch.equal(own[key], value) for key, value in parameters.items())


@pytest.mark.long
def test_four_ranks_train_as_fully_shard_does(four: list[dict[str, Any]]) -> None:
    """Four terms have many sums: to rounding."""
    for one in four:
        (losses, parameters), (mine, own) = one["plain"], one["memopt"]
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        for key, value in parameters.items():
            torch.testing.assert_close(own[key], value, **CLOSE)
            assert torch.equal(own[key], four[0]["memopt"][1][key])


def copies(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Two copies of the parameters, each sharded over two ranks."""
    model = sharded(ranks, copies=2)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    model = compiled(model, "3MB", optimizer)
    train(model, optimizer, [batch(step) for step in range(STEPS)])
    own = sharded(ranks, copies=2)
    optimizer = ADAMW(own.parameters(), lr=1e-2)
    own = compiled(own, "3MB", optimizer)
    train(own, optimizer, [batch(step, rank) for step in range(STEPS)])
    return {"equal": whole(model), "own": whole(own), "report": model.memopt.report()}


@pytest.mark.long
def test_copies_of_what_is_sharded_stay_the_same(tmp_path: Path) -> None:
    model, other = net(), net()
    train(model, ADAMW(model.parameters(), lr=1e-2), [batch(step) for step in range(STEPS)])
    optimizer = ADAMW(other.parameters(), lr=1e-2)
    for step in range(STEPS):
        parts = zip(*(batch(step, rank) for rank in range(4)), strict=True)
        train(other, optimizer, [tuple(torch.cat(part) for part in parts)])
    every = spawned(copies, 4, tmp_path)
    for one in every:
        for key, value in model.state_dict().items():
            assert torch.equal(one["equal"][key], value)
            assert torch.equal(one["own"][key], every[0]["own"][key])
            torch.testing.assert_close(one["own"][key], other.state_dict()[key], **CLOSE)


def saved(rank: int, ranks: int, folder: Path) -> Any:
    """Trained, and saved by torch's own distributed checkpoints."""
    model = sharded(ranks)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    model = compiled(model, "3MB", optimizer)
    train(model, optimizer, [batch(step) for step in range(3)])
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder / "checkpoint")


def resumed(rank: int, ranks: int, folder: Path) -> Any:
    """Trained on from there."""
    model = sharded(ranks)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    model = compiled(model, "3MB", optimizer)
    train(model, optimizer, [batch(7)])  # makes the state; what is loaded takes its place
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    losses = train(model, optimizer, [batch(step) for step in range(3, 6)])
    return losses, whole(model)


@pytest.mark.long
def test_a_checkpoint_of_four_ranks_goes_on_on_two_and_on_one(tmp_path: Path) -> None:
    model = net()
    losses = train(model, ADAMW(model.parameters(), lr=1e-2), [batch(step) for step in range(6)])
    spawned(saved, 4, tmp_path)
    for ranks in (2, 1):
        for mine, own in spawned(resumed, ranks, tmp_path):
            assert mine == losses[3:]
            assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())


def further(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Inference, a plain checkpoint, Inductor, Lomo, and what is refused."""
    found: dict[str, Any] = {}
    model = sharded(ranks)
    optimizer: torch.optim.Optimizer = Lomo(model.parameters(), lr=1e-2, in_backward=False)
    model = compiled(model, "3MB", optimizer)
    with torch.no_grad():
        found["inference"] = model(*batch(0))
    other = {key: torch.full(value.shape, 0.01) for key, value in net().state_dict().items()}
    model.load_state_dict(other)  # whole tensors, as a model of one process saves them
    found["loaded"] = whole(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other, "head.bias": torch.zeros(5)})
    model.load_state_dict(net().state_dict())
    found["lomo"] = train(model, optimizer, [batch(step) for step in range(5)])
    model = sharded(ranks)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    model = compiled(model, "3MB", optimizer, numerics="reordered", lowering="inductor")
    found["inductor"] = train(model, optimizer, [batch(step) for step in range(5)])
    found["peaks"] = model.memopt.plan.peak, model.memopt.measured.peak_bytes
    return found


@pytest.mark.long
def test_what_else_a_user_does(tmp_path: Path) -> None:
    model = net()
    loss = float(model(*batch(0)).detach())
    plain = train(model, ADAMW(model.parameters(), lr=1e-2), [batch(step) for step in range(5)])
    model = net()
    lomo = train(model, Lomo(model.parameters(), lr=1e-2, in_backward=False), [batch(step) for step in range(5)])
    for one in spawned(further, 2, tmp_path):
        assert float(one["inference"]) == loss
        assert all(bool((value == 0.01).all()) for value in one["loaded"].values())
        assert one["lomo"] == lomo
        assert one["inductor"] == pytest.approx(plain, rel=1e-5)
        assert one["peaks"][1] <= one["peaks"][0] * 1.03


def again(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """What happens to the model before, between and after plans: names in order, thawing, another budget, a region."""
    found: dict[str, Any] = {}
    Refused.ways_out = lambda self: ()  # type: ignore[method-assign]
    names = [name for name, _ in net().named_parameters()]
    model = sharded(ranks)
    with torch.no_grad():
        model(*batch(0))  # leaves the root's parameters whole
    planned = memopt.plan(model, batch(0), budget="3MB", optimizer=ADAMW(model.parameters()))
    every = format_size(sum(p.numel() * 4 for p in model.parameters()))
    found["all of it"] = any(f" of {every} on this rank" in note for note in planned.notes)
    found["as before"] = [name for name, _ in model.named_parameters()] == names
    model.layers.requires_grad_(False)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    memopt.compile(model, 1000, optimizer=optimizer, numerics="exact")
    with pytest.raises(BudgetError):
        model(*batch(0))
    model = compiled(model, "3MB", optimizer)  # again, with more
    plain = [re.sub(r"parametrizations\.(\w+)\.original", r"\1", name) for name, _ in model.named_parameters()]
    found["in order"] = plain == names
    found["frozen"] = train(model, optimizer, [batch(step) for step in range(2)])
    model.requires_grad_(True)
    found["thawed"] = train(model, optimizer, [batch(step) for step in range(2, 6)])

    model = sharded(ranks, kind=Checkpointed)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    model = compiled(model, "3MB", optimizer)
    found["checkpointed"] = train(model, optimizer, [batch(step) for step in range(3)])
    return found


@pytest.mark.long
def test_it_is_planned_again_and_thawed(tmp_path: Path) -> None:
    model = net()
    model.layers.requires_grad_(False)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    frozen = train(model, optimizer, [batch(step) for step in range(2)])
    model.requires_grad_(True)
    thawed = train(model, optimizer, [batch(step) for step in range(2, 6)])
    model = net()
    plain = train(model, ADAMW(model.parameters(), lr=1e-2), [batch(step) for step in range(3)])
    for one in spawned(again, 2, tmp_path):
        assert one["all of it"]
        assert one["as before"]
        assert one["in order"]
        assert one["frozen"] == frozen
        assert one["thawed"] == thawed
        assert one["checkpointed"] == plain


def asked(rank: int, ranks: int, folder: Path) -> list[str]:
    """What is refused, and why."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    def divided(model: Any) -> None:
        model.set_gradient_divide_factor(1.0)

    def unsynced(model: Any) -> None:
        model.set_requires_gradient_sync(False)

    cases: list[tuple[dict[str, Any], Any, Any, str]] = [
        ({}, lambda p: GaLore(p, rank=4), None, "stores it in fewer bits"),
        ({}, lambda p: torch.optim.Muon([each for each in p if each.ndim == 2]), None, "stores it in fewer bits"),
        ({}, AdamW8bit, None, "stores it in fewer bits"),
        ({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, ADAMW, None, "leave mp_policy out"),
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, ADAMW, None, "offloading"),
        ({}, ADAMW, divided, "a gradient divide factor"),
        ({}, ADAMW, unsynced, "backwards without reducing gradients"),
    ]
    said = []
    mesh = known_as(Mesh(ranks, rank, dist.group.WORLD))
    rows, own = torch.ones(97, 48), 49 if rank == 0 else 48
    within = record(lambda: torch.ops.memopt.mean_rows(rows, mesh, own)).peak() - 48 * 4 * own
    assert within <= workspace(MEAN_ROWS, (rows, mesh, own)) <= within + 8
    for options, build, change, why in cases:
        model = sharded(ranks, **options)
        if change is not None:
            change(model)
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=why) as refused:
            compiled(model, "3MB", build([*model.parameters()]))
        said.append(str(refused.value))
        assert [type(module) for module in model.modules()] == kinds
    return said


def test_what_fully_shard_is_asked_for_beyond_sharding_is_refused(tmp_path: Path) -> None:
    said, other = spawned(asked, 2, tmp_path)
    assert len(said) == 7
    assert said == other


class Rows(nn.Module):
    """Eight matrices of so many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(rows, 256) / 16) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x @ weight.t()).square().mean() for weight in self.weights]).sum()


def portions(rank: int, ranks: int, folder: Path) -> list[tuple[int, int]]:
    """An update in lists, of which the budget holds some parameters' at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    Refused.ways_out = lambda self: ()  # type: ignore[method-assign]
    found = []
    for rows in (132, 131):
        torch.manual_seed(0)
        model = Rows(rows)
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = ADAMW(model.parameters(), lr=1e-2, foreach=True)
        given: Any = {"example_inputs": (torch.randn(2, 256),), "optimizer": optimizer, "numerics": "exact"}
        with pytest.raises(BudgetError) as refused:
            memopt.compile(model, 1, **given)
        model = memopt.compile(model, refused.value.floor_bytes or 0, **given)
        for _ in range(3):
            model(torch.randn(2, 256)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((model.memopt.plan.peak, model.memopt.measured.peak_bytes))
    return found


@pytest.mark.long
def test_portions_are_of_what_a_rank_has(tmp_path: Path) -> None:
    for one in spawned(portions, 2, tmp_path):
        for rows, (predicted, measured) in zip((132, 131), one, strict=True):
            here = 8 * 66 * 256 * 4
            assert measured <= predicted + 64, rows
            assert predicted < 5.5 * here, "at once it takes all parameters' bytes several times more"


def dying(rank: int, ranks: int, folder: Path) -> str:
    model = sharded(ranks)
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    model = compiled(model, "3MB", optimizer)
    return outlived(rank, lambda: train(model, optimizer, [batch(0)]))


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    assert spawned(dying, 2, tmp_path)[0] not in ("it went on", "gone")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 97, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_rows_are_those_of_torch_chunk(rows: int, size: int) -> None:
    chunks = [*torch.arange(rows).chunk(size)]
    for index in range(size):
        own = torch.arange(rows)[Mesh(size, index, None).own(rows)]
        assert torch.equal(own, chunks[index] if index < len(chunks) else torch.arange(0))


def test_a_reader_says_what_it_gathers() -> None:
    name = known_as(Mesh(4, 1, "a group"))
    assert known_as(Mesh(4, 1, "a group")) == name != known_as(Mesh(4, 2, "a group"))
    assert repr(Gathered(97, name)) == "Gathered(97 rows, 4 ranks)"
