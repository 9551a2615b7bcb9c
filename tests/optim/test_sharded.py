"""Optimizer state shared out over ranks: real processes of a gloo group beside one process that does it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memopt
from memopt.errors import BudgetError, MemoptError
from memopt.optim import AdamW8bit, Sharded
from memopt.optim.ranks import Ranks
from memopt.refusal import Refused
from memopt.report import PlanResult
from tests.optim.ranks import STEPS, Net, batch, net, outlived, spawned, train

ADAMW = torch.optim.AdamW
# Sums in another order: where a gradient is near 0, Adam's first steps, each about lr = 1e-2 long, turn rounding into a
# share of a step.
CLOSE = {"rtol": 1e-3, "atol": 2e-3}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what it holds for each element, without step counts."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())


def compiled(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Trained with the same batches on every rank."""
    model = net()
    optimizer = Sharded(model.parameters(), ADAMW, shards=ranks, lr=1e-2)
    model = memopt.compile(model, budget="3MB", optimizer=optimizer, numerics="exact", example_inputs=batch(0))
    losses = train(model, optimizer, [batch(step) for step in range(STEPS)])
    plan, saved = model.memopt.plan, optimizer.state_dict()
    return {
        "losses": losses, "parameters": model.state_dict(), "state": state_bytes(optimizer), "saved": saved,
        "predicted": plan.peak, "measured": model.memopt.measured.peak_bytes, "report": model.memopt.report(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks found."""
    return spawned(compiled, 4, tmp_path_factory.mktemp("four"))


def test_equal_batches_train_as_one_process_does(four: list[dict[str, Any]]) -> None:
    """The mean of n equal gradients is exact for n a power of two, so every bit must agree."""
    model = net()
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, [batch(step) for step in range(STEPS)])
    for one in four:
        assert one["losses"] == losses
        assert all(torch.equal(one["parameters"][key], value) for key, value in model.state_dict().items())
        assert one["measured"] <= one["predicted"] <= 3_000_000
        assert "4 ranks average their gradients" in one["report"]
    assert four[0]["measured"] == four[0]["predicted"]  # its stretches are the longest
    assert sum(one["state"] for one in four) == state_bytes(optimizer)
    assert max(one["state"] for one in four) <= state_bytes(optimizer) / 4 + 2 * 4 * 256 * len(optimizer.state)


def test_a_checkpoint_of_four_ranks_goes_on_on_two_and_on_one(four: list[dict[str, Any]], tmp_path: Path) -> None:
    torch.save(four[0], tmp_path / "checkpoint.pt")
    more = [batch(STEPS + step) for step in range(3)]
    alone = net()
    alone.load_state_dict(four[0]["parameters"])
    optimizer = ADAMW(alone.parameters(), lr=1.0)
    optimizer.load_state_dict(four[0]["saved"])
    train(alone, optimizer, more)
    for one in spawned(resumed, 2, tmp_path):
        assert all(torch.equal(one[key], value) for key, value in alone.state_dict().items())


def resumed(rank: int, ranks: int, folder: Path) -> Any:
    saved = torch.load(folder / "checkpoint.pt", weights_only=False)
    model = net()
    model.load_state_dict(saved["parameters"])
    optimizer = Sharded(model.parameters(), ADAMW, lr=1.0)
    optimizer.load_state_dict(saved["saved"])
    train(model, optimizer, [batch(STEPS + step) for step in range(3)])
    return model.state_dict()


WAYS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "plain": (ADAMW, {}),
    "in groups": (ADAMW, {"shards": 2}),
    "not shared": (ADAMW, {"shards": 1}),
    "clipped": (torch.optim.SGD, {"max_norm": 0.1, "momentum": 0.9}),
    "8bit": (AdamW8bit, {"least": 1024}),
}


def several(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Trained in each way with batches of one's own."""
    own = [batch(step, rank) for step in range(STEPS)]
    found: dict[str, Any] = {}
    for name, (kind, options) in WAYS.items():
        model = net() if not rank else Net()  # ranks that begin otherwise get what the first begins with
        optimizer = Sharded(model.parameters(), kind, lr=1e-2, **options)
        train(model, optimizer, own)
        found[name] = model.state_dict()
        found[f"{name}: state"] = optimizer.state_dict()
    kind, options = WAYS["8bit"]
    again = Sharded(net().parameters(), kind, shards=2, **options)
    again.load_state_dict(found["8bit: state"])
    found["8bit: state again"] = again.state_dict()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks found in each way."""
    return spawned(several, 4, tmp_path_factory.mktemp("several"))


def alone(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    """One process that trains with the batches of all four ranks."""
    model, clip = net(), options.pop("max_norm", None)
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    for step in range(STEPS):
        parts = zip(*(batch(step, rank) for rank in range(4)), strict=True)
        model(*(torch.cat(part) for part in parts)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", WAYS)
def test_batches_of_their_own_train_as_one_process_with_all_of_them(name: str, trained: list[dict[str, Any]]) -> None:
    kind, options = WAYS[name]
    model, optimizer = alone(kind, **{key: value for key, value in options.items() if key != "shards"})
    near = 1e-2 if name == "8bit" else 1e-5  # a moment that lies between two codes may get the other
    began = net().state_dict()
    for one in trained:
        for key, value in model.state_dict().items():
            moved, rounding = (value - began[key]).norm(), torch.finfo(value.dtype).eps * value.norm()
            assert (one[name][key] - value).norm() <= near * moved + rounding
            assert torch.equal(one[name][key], trained[0][name][key])
    saved, whole = trained[0][f"{name}: state"], optimizer.state_dict()
    assert saved["state"].keys() == whole["state"].keys()
    for index, state in whole["state"].items():
        for key, value in state.items():
            mine = saved["state"][index][key]
            assert not isinstance(value, torch.Tensor) or (mine.shape, mine.dtype) == (value.shape, value.dtype)
    optimizer.load_state_dict(saved)


def test_coded_moments_survive_being_shared_out_anew(trained: list[dict[str, Any]]) -> None:
    """Codes of four stretches made whole, cut into two and made whole again are the same codes; and the right ones."""
    first, again = trained[0]["8bit: state"], trained[0]["8bit: state again"]
    coded = 0
    for index, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["state"][index][key]))
            coded += torch.as_tensor(value).dtype is torch.uint8
    assert coded >= 8
    _, optimizer = alone(AdamW8bit, least=1024)
    assert isinstance(optimizer, AdamW8bit)
    whole = optimizer.plain_state_dict()["state"]
    optimizer.load_state_dict(first)
    for index, state in optimizer.plain_state_dict()["state"].items():
        off = (state["exp_avg"] - whole[index]["exp_avg"]).norm()
        assert off < 0.1 * whole[index]["exp_avg"].norm()


def in_backward(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Trained under a budget that only updates in backward hold."""
    Refused.ways_out = lambda self: ()  # type: ignore[method-assign]  # each is a plan of its own; this process ends
    model, own = net(), [batch(step, rank) for step in range(STEPS)]
    optimizer = Sharded(model.parameters(), ADAMW, lr=1e-2)
    asked = {"optimizer": optimizer, "lowering": "eager", "example_inputs": own[0]}
    with pytest.raises(BudgetError) as refused:
        memopt.compile(model, budget="1B", **asked)
    model = memopt.compile(model, budget=(refused.value.floor_bytes or 0) - 1, update="backward", **asked)
    train(model, optimizer, own)
    told = model.memopt
    return {"plain": model.state_dict(), "report": told.report(), "peaks": (told.measured.peak_bytes, told.plan.peak)}


@pytest.mark.long
def test_gradients_are_not_kept_where_the_backward_updates(tmp_path: Path) -> None:
    model = net()
    optimizer = ADAMW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        parts = zip(*(batch(step, rank) for rank in range(2)), strict=True)
        train(model, optimizer, [tuple(torch.cat(part) for part in parts)])
    for one in spawned(in_backward, 2, tmp_path):
        assert "parameters are updated in the backward" in one["report"]
        assert one["peaks"][0] <= one["peaks"][1]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(one["plain"][key], value, **CLOSE)


def dying(rank: int, ranks: int, folder: Path) -> str:
    model = net()
    optimizer = Sharded(model.parameters(), ADAMW)
    return outlived(rank, lambda: train(model, optimizer, [batch(0)]))


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    assert spawned(dying, 2, tmp_path)[0] not in ("it went on", "gone")


def refused(rank: int, ranks: int, folder: Path) -> tuple[str, Any]:
    """A budget that nothing holds, and ranks whose shapes differ."""
    Refused.ways_out = lambda self: ()  # type: ignore[method-assign]  # each is a plan of its own; this process ends
    model = net()
    optimizer = Sharded(model.parameters(), ADAMW)
    try:
        memopt.compile(model, budget="100KB", optimizer=optimizer, lowering="eager", example_inputs=batch(0))
    except BudgetError as error:
        first = (error.floor_bytes, str(error))
    try:
        memopt.compile(
            model, budget="9MB", optimizer=optimizer, lowering="eager", example_inputs=batch(0, rows=4 + rank)
        )
    except MemoptError as error:
        return str(error), first
    return "", first


@pytest.mark.long
def test_refusals_are_the_same_on_every_rank(tmp_path: Path) -> None:
    (said, first), (also, second) = spawned(refused, 2, tmp_path)
    assert first == second
    assert first[0] > 100_000
    assert said == also
    assert "rank 1 cannot run the plan of rank 0" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": torch.optim.Muon}, "cannot be sharded"),
        ({"kind": ADAMW}, "no process group"),
        ({"kind": ADAMW, "ranks": 4, "shards": 3}, "must divide"),
        ({"kind": ADAMW, "ranks": "4"}, "must divide"),
        ({"kind": ADAMW, "ranks": 0}, "must divide"),
        ({"kind": "AdamW", "ranks": 4}, "'AdamW' cannot be sharded"),
        ({"kind": ADAMW, "ranks": 4, "max_norm": 0.0}, "largest norm"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Sharded(net().parameters(), **options)


def test_ranks_that_are_not_there_are_for_planning_alone() -> None:
    model = net()
    optimizer = Sharded(model.parameters(), ADAMW, ranks=4, shards=4)
    planned = memopt.plan(model, batch(0), budget="9MB", optimizer=optimizer, lowering="eager")
    whole = memopt.plan(model, batch(0), budget="9MB", optimizer=ADAMW(model.parameters()), lowering="eager")
    bytes_of = {n: s.nbytes for n, s in planned.before.storages.items() if s.kind == "state"}
    assert sum(bytes_of.values()) < 0.3 * sum(s.nbytes for s in whole.before.storages.values() if s.kind == "state")
    model(*batch(0)).backward()
    with pytest.raises(MemoptError, match="for planning alone"):
        optimizer.step()


def test_a_plan_shares_state_among_no_more_ranks_than_it_must() -> None:
    model = net()

    def planned(budget: int, **options: Any) -> PlanResult:
        optimizer = Sharded(model.parameters(), ADAMW, ranks=4, **options)
        return memopt.plan(model, batch(0), budget=budget, optimizer=optimizer, lowering="eager")

    peaks = {shards: planned(10_000_000, shards=shards).peak for shards in (1, 2, 4)}
    for budget, shards in ((peaks[1], 1), (peaks[1] - 1, 2), (peaks[2] - 1, 4), (10_000_000, 1)):
        notes = " ".join(planned(budget).notes)
        assert f"each copy of the optimizer's state is shared by {shards}," in notes


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1023, 1024, 1025, 100_000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_stretches_cover_every_element_once(count: int, size: int) -> None:
    taken = [at for index in range(size) for at in range(count)[Ranks(size, index).own(count)]]
    assert taken == list(range(count))
