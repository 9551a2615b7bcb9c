"""Parts of a value elsewhere: the first quarters in a pool, the rest behind their token."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.cost import Roofline
from memopt.devices import device
from memopt.edit import DISK, TOKEN, edit, packed_behind
from memopt.graph import Step, StepGraph, Storage, TensorInfo, verify
from memopt.passes.packing import packed
from memopt.planfile import save_plan
from memopt.prices import priced
from memopt.runtime import disk, host
from memopt.runtime.measure import measure_step
from memopt.runtime.opcost import OpCost
from memopt.tokens import part_codec, part_of
from tests.passes.test_packing import stepped
from tests.synthetic import mlp


@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_what_was_moved_and_what_stayed_come_back(kind: str, quarters: int, dtype: torch.dtype, tmp_path: Path) -> None:
    pool: Any = disk.use(tmp_path, 1 << 20) if kind == "disk" else host.use(1 << 20)
    pack, unpack = (
        getattr(torch.ops.memopt, f"{way}_{part_codec(pool.codec, quarters)}") for way in ("pack", "unpack")
    )
    x = torch.randn(7, 19, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    packed = pack(x, x.stride())
    gone = 133 * quarters // 4
    assert packed.nbytes == TOKEN + (133 - gone) * x.itemsize
    assert pool.held == (host.room(gone * x.itemsize) if kind == "host" else gone * x.itemsize)
    again = unpack(packed, x.shape, x.stride(), dtype)
    assert torch.equal(again, x)
    assert again.stride() == x.stride()
    del packed
    assert pool.held == 0


@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_part_may_be_on_its_way_while_the_step_goes_on(kind: str, quarters: int, tmp_path: Path) -> None:
    pool: Any = disk.use(tmp_path, 1 << 20) if kind == "disk" else host.use(1 << 20)
    codec = part_codec(pool.codec, quarters)
    start, drain, fetch, arrive = (
        getattr(torch.ops.memopt, f"{way}_{codec}") for way in ("start", "drain", "fetch", "arrive")
    )
    x = torch.randn(7, 19, generator=torch.Generator().manual_seed(0)).t()
    token = start(x, x.stride())
    landed = drain(x, token, x.stride())
    gone = 133 * quarters // 4 * x.itemsize
    assert (token.nbytes, landed.nbytes) == (TOKEN, TOKEN + 133 * x.itemsize - gone)
    assert pool.held == (host.room(gone) if kind == "host" else gone)
    del token  # the bytes are the landed one's by now
    want = x.clone()
    x.zero_()
    again = fetch(landed, x.shape, x.stride(), x.dtype)
    arrive(again)
    assert torch.equal(again, want)
    assert again.stride() == x.stride()
    del landed
    gc.collect()
    assert pool.held == 0


def test_no_slot_is_taken_where_there_is_no_memory_for_what_stays(tmp_path: Path) -> None:
    pool = disk.use(tmp_path, 1 << 20)
    with pytest.raises(RuntimeError, match="allocate"):
        pool.pack(torch.zeros(10), torch.empty(1 << 50, device="meta"))
    assert (pool.held, pool.slots) == (0, {})


@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_a_part_is_known_by_its_codec(quarters: int) -> None:
    assert part_of(part_codec("host_12", quarters)) == ("host_12", quarters)


class Few(nn.Module):
    """Four values that backward needs, and little else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


SAVED = 4096 * 64 * 4  # bytes of each


def compiled(x: Tensor, budget: int | str, passes: str = "-recompute,-overlap", **options: Any) -> Any:
    torch.manual_seed(0)
    model = Few()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    return memopt.compile(
        model, budget, optimizer=optimizer, example_inputs=(x,), passes=passes,
        **{"lowering": "eager", "numerics": "exact"} | options,
    )  # fmt: skip


def test_no_more_of_a_large_value_moves_than_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.Pool, "rates", lambda _: disk.DiskRates(1e8, 1e8, 1e-6))
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    place = {"disk_budget": "1GB", "disk_path": tmp_path}
    whole = compiled(x, "4GB").memopt.plan.peak
    torch.manual_seed(0)
    want, seconds = stepped(Few(), x), {}
    for quarters in (1, 2, 3, 4):
        budget = whole - quarters * SAVED // 4 + 2 * TOKEN
        model = compiled(x, budget, **place)
        plan = model.memopt.plan
        assert sum(amount for r in plan.plan.chosen for _, amount in r.takes) == quarters * SAVED // 4
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        assert measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes == plan.peak <= budget  # noqa: B023
        seconds[quarters] = plan.plan.seconds
        assert all(map(torch.equal, stepped(compiled(x, budget, **place), x), want))
    assert seconds[1] < seconds[2] < seconds[3]


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_no_more_is_on_its_way_than_must_where_the_disk_is_what_the_step_waits_for(
    lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk so slow that nothing computed hides a copy, a quarter adds half of what two do."""
    monkeypatch.setattr(disk.Pool, "rates", lambda _: disk.DiskRates(1e7, 1e7, 1e-6))
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"lowering": lowering, "numerics": "reordered", "passes": "-recompute,-stream"}
    model = compiled(x, "4GB", **given)
    whole, want, seconds = model.memopt.plan.peak, stepped(model, x), []
    for quarters in (1, 2):
        budget = whole - quarters * SAVED // 4 + 3 * TOKEN
        model = compiled(x, budget, disk_budget="1GB", disk_path=tmp_path, **given)
        plan = model.memopt.plan
        assert sum(amount for r in plan.plan.chosen for _, amount in r.takes) == quarters * SAVED // 4
        assert any(r.drained and r.fetched for r in plan.plan.chosen)
        assert all(map(torch.equal, stepped(model, x), want))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        assert measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes == plan.peak <= budget  # noqa: B023
        seconds.append(plan.plan.seconds)
    assert 0 < 1.8 * seconds[0] < seconds[1]


def test_what_stays_of_a_part_is_priced_at_its_waits() -> None:
    """Whatever a part takes beyond its share of the whole, the step computes itself."""
    graph, _ = mlp(2)
    offers = [replace(packed(graph, "offload_disk", "a0", (part_codec("disk_0", q), TOKEN)), takes=((DISK, 1.0),))
              for q in (1, 4)]  # fmt: skip
    seconds = {"a0_disk1of4": 1.5, "a0_from_disk1of4": 2.75, "a0_disk": 4.0, "a0_from_disk": 8.0}
    roofline = Roofline(device("rtx4090"))
    _, found = priced(graph, offers, roofline, lambda step, _: OpCost(seconds[step.name], 0, 0))
    assert found == seconds | {"a0_disk1of4_landed": 0.5, "a0_from_disk1of4_arrived": 0.75}


def test_where_the_disk_is_never_waited_for_no_part_is_moved_whose_rest_would_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What computes copies what stays of a part, however well the rest hides."""
    monkeypatch.setattr(disk.Pool, "rates", lambda _: disk.DiskRates(1e13, 1e13, 1e-9))
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    budget = compiled(x, "4GB", "-recompute,-stream").memopt.plan.peak - SAVED // 4 + 3 * TOKEN
    plan = compiled(x, budget, "-recompute,-stream", disk_budget="1GB", disk_path=tmp_path).memopt.plan
    assert sum(amount for r in plan.plan.chosen for _, amount in r.takes) == SAVED
    assert all(r.drained for r in plan.plan.chosen)


def test_a_saved_plan_moves_the_same_part(tmp_path: Path) -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    budget = compiled(x, "4GB").memopt.plan.peak - SAVED // 4 + 2 * TOKEN
    place = {"disk_budget": "1GB", "disk_path": tmp_path}
    made = compiled(x, budget, **place).memopt.plan
    save_plan(made, tmp_path / "plan.json")
    again = compiled(x, budget, plan_file=tmp_path / "plan.json", **place).memopt.plan
    assert again.reused
    assert again.plan.chosen == made.plan.chosen


def test_a_part_is_packed_behind_its_programs_last_forward_reader_and_a_whole_value_behind_its_maker() -> None:
    """What stays of a part is copied there, which before would be bytes beside the value. Another program, which may
    read it as its input, has code of its own; what the backward reads comes too late."""
    sizes = {"x": 4, "0/v": 400, "0/w": 4, "1/y": 4, "d": 4}
    steps = (
        Step("0/v", "v", "forward", ("x",), ("0/v",)),
        Step("0/w", "w", "forward", ("0/v",), ("0/w",)),
        Step("1/y", "y", "forward", ("0/v", "0/w"), ("1/y",)),
        Step("d", "d", "backward", ("0/v", "1/y"), ("d",)),
    )
    storages = {name: Storage(name, size) for name, size in sizes.items()}
    tensors = {name: TensorInfo(name, (size,), "uint8", name) for name, size in sizes.items()}
    graph = verify(StepGraph(("x",), steps, ("d",), tensors, storages))
    given: tuple[tuple[int, tuple[tuple[str, float], ...], int], ...] = (
        (TOKEN + 300, ((DISK, 100.0),), 1), (TOKEN, ((DISK, 400.0),), 0), (100, (), 0),
    )  # fmt: skip
    for nbytes, takes, behind in given:
        made = replace(packed(graph, "trade", "0/v", ("codec", nbytes)), span=("d", "d"), takes=takes)
        assert packed_behind(graph, made) == behind
        order = [step.name for step in edit(graph, [made]).steps]
        assert order[behind + 1] == made.pack[0].name
