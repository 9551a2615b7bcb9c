"""Activations on disk: the step is bit-identical, the file is bounded and nameless, and what goes wrong is said."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.planfile import save_plan
from memopt.runtime import disk
from memopt.runtime.measure import measure_step
from tests.passes.test_packing import stepped


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.1) + x
        return x.square().mean()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2048, 256, generator=torch.Generator().manual_seed(1))


GB = 10**9


def compiled(x: Tensor, budget: int | str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Stack()
    options.setdefault("optimizer", torch.optim.SGD(model.parameters(), 1e-3))
    options = {"lowering": "eager", "numerics": "exact", **options}
    return memopt.compile(model, budget, example_inputs=(x,), **options)


@pytest.fixture
def whole(x: Tensor) -> int:
    """Peak of the step without a budget, bytes."""
    return int(compiled(x, "4GB").memopt.plan.peak)


def test_a_step_with_activations_on_disk_changes_no_bit_and_is_as_small_as_planned(
    x: Tensor, whole: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    want = stepped(Stack(), x)
    model = compiled(x, int(0.7 * whole), passes="-recompute,-pack_masks", disk_budget="1GB", disk_path=tmp_path)
    pool = disk.use(tmp_path, GB)
    for _ in range(3):
        assert all(map(torch.equal, stepped(model, x), want))
        assert (pool.held, pool.slots) == (0, {})
    plan = model.memopt.plan
    assert [lever.lever for lever in plan.levers] == ["offload_disk"]
    stored = sum(decision.bytes for decision in plan.decisions)
    assert stored <= pool.end <= max(2 * stored, 2 * disk.TRIAL)  # places are used again, step after step
    assert list(tmp_path.iterdir()) == []  # the file has no name
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    measured = measure_step(lambda: model(x), optimizer, resident=[model, x])
    assert measured.peak_bytes == plan.peak <= int(0.7 * whole)


def test_what_lies_on_disk_stays_within_its_budget(x: Tensor, whole: int, tmp_path: Path) -> None:
    limit = 3 * x.numel() * 4
    plan = compiled(x, int(0.9 * whole), passes="-recompute", disk_budget=limit, disk_path=tmp_path).memopt.plan
    stored = [d.bytes + 16 for d in plan.decisions if d.lever == "offload_disk"]
    assert 0 < sum(stored) <= limit


def test_it_is_named_as_a_way_out(x: Tensor, whole: int) -> None:
    with pytest.raises(memopt.BudgetError) as refused:
        compiled(x, int(0.8 * whole), passes="-recompute,-pack_masks")
    ways = {way.change: way for way in refused.value.ways_out}
    (found,) = [change for change in ways if change.startswith("disk_budget=")]
    assert ways[found].numerics == "exact"


def test_neither_is_offered_beside_the_other(x: Tensor) -> None:
    """A disk that fails in a backward which already updates would leave a step half done."""
    for options, other in (({"disk_budget": "1GB"}, "update="), ({"update": "backward"}, "disk_budget=")):
        with pytest.raises(memopt.BudgetError) as refused:
            compiled(x, 1, passes="-recompute", **options)
        changes = [way.change for way in refused.value.ways_out]
        assert changes
        assert not [change for change in changes if change.startswith(other)]


def test_a_forward_without_a_backward_leaves_nothing_there(x: Tensor, whole: int, tmp_path: Path) -> None:
    model = compiled(x, int(0.7 * whole), passes="-recompute", disk_budget="1GB", disk_path=tmp_path)
    loss = model(x)
    assert disk.use(tmp_path, GB).held > 0
    del loss
    gc.collect()
    assert disk.use(tmp_path, GB).held == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"disk_budget": "1GB", "disk_path": "/nowhere/at/all"}, "is not a folder"),
        ({"disk_path": "/tmp"}, "give both"),
        ({"disk_budget": "many"}, "budget 'many' refused"),
        ({"disk_budget": "900PB"}, "refused"),
        ({"disk_budget": "1GB", "update": "backward"}, "exclude each other"),
    ],
)
def test_bad_folders_and_budgets_are_refused_before_anything_happens(x: Tensor, options: Any, said: str) -> None:
    model = Stack()
    with pytest.raises(ValueError, match=said):
        memopt.compile(model, "1GB", **options)
    assert not hasattr(model, "memopt")


def test_a_full_disk_gives_up_the_step_and_changes_nothing(x: Tensor, whole: int, tmp_path: Path) -> None:
    model = compiled(x, int(0.7 * whole), passes="-recompute", disk_budget="1GB", disk_path=tmp_path)
    want = stepped(model, x)
    before = [p.detach().clone() for p in model.parameters()]

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with patch.object(disk.os, "pwrite", full), pytest.raises(disk.DiskError, match="No space left on device"):
        model(x)
    gc.collect()
    assert disk.use(tmp_path, GB).held == 0
    assert all(map(torch.equal, model.parameters(), before))
    assert all(map(torch.equal, stepped(model, x), want))  # and the next step runs as ever


def test_a_file_that_was_cut_is_an_error_not_a_wrong_gradient(x: Tensor, whole: int, tmp_path: Path) -> None:
    model = compiled(x, int(0.7 * whole), passes="-recompute", disk_budget="1GB", disk_path=tmp_path)
    loss = model(x)
    os.ftruncate(disk.use(tmp_path, GB).file.fileno(), 0)
    with pytest.raises(disk.DiskError, match="the file was cut"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    script = f"""
        import os, signal, torch
        from memopt.runtime import disk
        pool = disk.use({str(tmp_path)!r}, 10**9)
        token = pool.pack(torch.ones(1 << 20))
        assert os.fstat(pool.file.fileno()).st_size == 4 << 20
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_step_killed_with_copies_under_way_leaves_no_file(x: Tensor, whole: int, tmp_path: Path) -> None:
    """The process dies while the first copy is still being written, in the step's own forward."""
    script = f"""
        import os, signal, threading, torch
        from memopt.runtime import disk
        from tests.runtime.test_disk import compiled
        x = torch.randn(2048, 256)
        model = compiled(x, {int(0.7 * whole)}, passes="-recompute", disk_budget="1GB", disk_path={str(tmp_path)!r})
        pool = disk.use({str(tmp_path)!r}, 10**9)
        begun, waits = threading.Event(), any(r.drained for r in model.memopt.plan.plan.chosen)
        def slow(*given):
            begun.set()
            threading.Event().wait(60)
        pool.put = slow
        threading.Thread(target=lambda: (begun.wait(), print(pool.held > 0, waits, flush=True),
                                         os.kill(os.getpid(), signal.SIGKILL))).start()
        model(x).backward()
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "True True\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_models_keep_to_their_own_folders_and_limits(x: Tensor, whole: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    options = {"passes": "-recompute", "disk_budget": "1GB"}
    first = compiled(x, int(0.7 * whole), disk_path=tmp_path / "a", **options)
    second = compiled(x, int(0.7 * whole), disk_path=tmp_path / "b", **options)
    for model, mine, other in ((first, "a", "b"), (second, "b", "a")):
        loss = model(x)
        assert disk.use(tmp_path / mine, GB).held > 0
        assert disk.use(tmp_path / other, GB).held == 0
        del loss
        gc.collect()


def test_more_than_the_budget_is_refused_while_it_runs(tmp_path: Path) -> None:
    pool = disk.use(tmp_path, 1 << 20)
    tokens = [pool.pack(torch.ones(1 << 17)) for _ in range(2)]
    with pytest.raises(disk.DiskError, match="exceed the disk_budget"):
        pool.pack(torch.ones(1))
    tokens.pop()
    pool.pack(torch.ones(1))


def test_threads_do_not_write_over_each_other(tmp_path: Path) -> None:
    pool = disk.use(tmp_path, GB)

    def through(value: float) -> bool:
        out = torch.empty(1 << 20)
        for turn in range(5):
            token = pool.pack(torch.full((1 << 20,), value + turn))
            pool.unpack(token, out)
            if not bool((out == value + turn).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(through, (0.0, 10.0, 20.0, 30.0)))
    assert (pool.held, pool.slots) == (0, {})


def test_a_forked_child_has_a_file_of_its_own(tmp_path: Path) -> None:
    pool = disk.use(tmp_path, GB)
    token, out = pool.pack(torch.full((1000,), 3.0)), torch.empty(1000)
    if (child := os.fork()) == 0:
        code = 1
        try:
            with pytest.raises(disk.DiskError, match="another process"):
                pool.unpack(token, out)
            own = pool.pack(torch.full((1000,), 7.0))
            pool.unpack(own, out)
            code = 0 if bool((out == 7.0).all()) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    pool.unpack(token, out)
    assert bool((out == 3.0).all())


def test_a_folder_that_cannot_be_written_is_no_way_out_and_no_other_error(x: Tensor, whole: int) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    unused: dict[Any, Any] = {}
    with (
        patch.object(disk.os, "pwrite", full),
        patch.object(disk, "pools", unused),
        pytest.raises(memopt.BudgetError) as refused,
    ):
        compiled(x, int(0.8 * whole), passes="-recompute,-pack_masks")
    for pool in unused.values():
        pool.file.close()
    assert not [way for way in refused.value.ways_out if way.change.startswith("disk_budget=")]


def operation(pool: disk.Pool, kind: str) -> Any:
    return getattr(torch.ops.memopt, f"{kind}_{pool.codec}")


class Viewed(nn.Module):
    """One value that the backward wants as three views, of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256)
        self.heads = nn.ModuleList([nn.Linear(256, 8), nn.Linear(64, 8), nn.Linear(2048, 8)])
        self.behind = Stack()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        a, b, c = self.heads
        early = a(h).square().mean() + b(h.view(-1, 64)).square().mean() + c(h.t()).square().mean()
        return early + self.behind(x)


def test_a_value_is_written_once_however_many_views_want_it(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    want = stepped(Viewed(), x)
    torch.manual_seed(0)
    model, pool = Viewed(), disk.use(tmp_path, GB)
    only = {"passes": "-recompute,-stream", "numerics": "exact", "lowering": "eager"}
    whole = memopt.plan(model, (x,), budget="4GB", **only).peak
    memopt.compile(model, int(0.6 * whole), example_inputs=(x,), disk_budget="1GB", disk_path=tmp_path, **only)
    plan: Any = model.memopt.plan
    moved, graph = {remake.value for remake in plan.plan.chosen}, plan.before
    looks = {value: [t for t in graph.tensors.values() if t.storage == value] for value in moved}
    assert max(map(len, looks.values())) >= 3
    for _ in range(2):
        before = pool.count
        assert all(map(torch.equal, stepped(model, x), want))
        assert pool.count == before + len(moved)


def test_copies_of_a_step_are_under_way_while_it_computes(x: Tensor, whole: int, tmp_path: Path) -> None:
    """The plan says so, and is cheaper for it; saved and used again it has the same moments."""
    options: dict[str, Any] = {"disk_budget": "1GB", "disk_path": tmp_path}
    passes = "-recompute,-pack_masks"
    model = compiled(x, int(0.7 * whole), passes=passes, **options)
    awaited = compiled(x, int(0.7 * whole), passes=f"{passes},-overlap", **options).memopt.plan
    plan = model.memopt.plan
    assert all(r.drained and r.fetched for r in plan.plan.chosen)
    assert not any(r.drained or r.fetched for r in awaited.plan.chosen)
    assert plan.plan.seconds < awaited.plan.seconds
    save_plan(plan, tmp_path / "plan.json")
    again = compiled(x, int(0.7 * whole), passes=passes, plan_file=tmp_path / "plan.json", **options).memopt.plan
    assert again.plan.chosen == plan.plan.chosen
    assert (again.plan.peak, again.plan.seconds) == (plan.plan.peak, plan.plan.seconds)


def computing(code: str, first: str, last: str) -> list[int]:
    """How much generated code computes between the beginnings of copies and their ends, one by one in their order."""
    lines = [line.strip() for line in code.splitlines() if not line.strip().startswith(("#", "assert_"))]
    places = [[at for at, line in enumerate(lines) if f"memopt.{kind}_disk" in line] for kind in (first, last)]
    assert len(places[0]) == len(places[1]) > 0
    works = [at for at, line in enumerate(lines) if line.startswith(("cpp_fused", "extern_kernels."))]
    return [sum(begin < at < end for at in works) for begin, end in zip(*places, strict=True)]


def test_generated_code_computes_while_copies_are_under_way(x: Tensor, tmp_path: Path) -> None:
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    given: dict[str, Any] = {"numerics": "reordered", "passes": "-recompute,-pack_masks,-stream"}
    inductor, codes = partial(compiled, x, lowering="inductor", **given), list[str]()
    plain = inductor("4GB")
    want, budget = stepped(plain, x), int(0.7 * plain.memopt.plan.peak)
    with config.patch(fx_graph_cache=False), patch.object(GraphLowering, "save_output_code", codes.append):
        model = inductor(budget, disk_budget="1GB", disk_path=tmp_path)
        for _ in range(3):
            assert all(map(torch.equal, stepped(model, x), want))
    plan = model.memopt.plan
    assert plan.plan.chosen
    assert all(r.drained and r.fetched for r in plan.plan.chosen)
    forward, backward = (next(c for c in reversed(codes) if f"memopt.{kind}_disk" in c) for kind in ("start", "fetch"))
    assert sum(computing(forward, "start", "drain")) > 0
    assert sum(computing(backward, "fetch", "arrive")) > 0
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    assert measure_step(lambda: model(x), optimizer, resident=[model, x]).peak_bytes == plan.peak <= budget


def test_copies_of_what_a_kernel_hands_out_as_a_view_are_under_way_beside_it(x: Tensor, tmp_path: Path) -> None:
    whole = x.view(8, 256, 256)  # linear layers look at three dimensions as two
    given: dict[str, Any] = {
        "passes": "-recompute,-pack_masks,-stream",
        "lowering": "inductor",
        "numerics": "reordered",
    }
    plain = compiled(whole, "4GB", **given)
    want, budget = stepped(plain, whole), int(0.8 * plain.memopt.plan.peak)
    model = compiled(whole, budget, disk_budget="1GB", disk_path=tmp_path, **given)
    plan = model.memopt.plan
    assert plan.plan.chosen
    assert all(remake.drained and remake.fetched for remake in plan.plan.chosen)
    assert all(map(torch.equal, stepped(model, whole), want))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    measured = measure_step(lambda: model(whole), optimizer, resident=[model, whole])
    assert measured.peak_bytes == plan.peak <= budget


def test_a_step_goes_on_while_a_copy_is_written_and_read(tmp_path: Path) -> None:
    """Neither way ends before the test lets it, and `start` and `fetch` have returned long before."""
    pool, x = disk.use(tmp_path, GB), torch.randn(64, 1000).t()
    may_write, may_read = threading.Event(), threading.Event()
    put, read = pool.put, pool.read
    with (
        patch.object(pool, "put", lambda *a: (may_write.wait(60), put(*a))),
        patch.object(pool, "read", lambda *a: (may_read.wait(60), read(*a))),
    ):
        token = operation(pool, "start")(x, x.stride())
        assert not pool.flights[1][0].done.done()
        may_write.set()
        landed = operation(pool, "drain")(x, token, x.stride())
        back = operation(pool, "fetch")(landed, x.shape, x.stride(), x.dtype)
        del token, landed
        gc.collect()
        assert list(pool.slots) == [1]  # the token is dead, but its place is still read
        other = pool.pack(torch.zeros(64000))
        may_read.set()
        operation(pool, "arrive")(back)
    assert torch.equal(back, x)
    del other
    gc.collect()
    pool.back.submit(int).result()  # what follows a copy in its thread has run as well
    assert (pool.held, pool.slots, pool.flights, pool.arriving, pool.owners) == (0, {}, {}, {}, {})


def test_a_step_given_up_while_it_is_written_frees_nothing_too_early(tmp_path: Path) -> None:
    pool, go = disk.use(tmp_path, GB), threading.Event()
    put = pool.put
    with patch.object(pool, "put", lambda *a: (go.wait(60), put(*a))):
        token = operation(pool, "start")(torch.ones(5000), (1,))
        (flight,) = pool.flights[1]
        del token
        gc.collect()
        assert flight.kept is not None
        assert list(pool.slots) == [1]
        go.set()
        flight.done.result()
    pool.out.submit(int).result()
    assert (pool.held, pool.slots, pool.flights, flight.kept) == (0, {}, {}, None)


def test_what_is_laid_out_otherwise_is_written_at_once(tmp_path: Path) -> None:
    """The copy in the captured layout is a temporary: a thread would hold bytes that no plan counts."""
    pool, x = disk.use(tmp_path, GB), torch.randn(100, 7)
    token = operation(pool, "start")(x, (1, 100))
    assert pool.flights == {}
    back = operation(pool, "fetch")(operation(pool, "drain")(x, token, (1, 100)), x.shape, (1, 100), x.dtype)
    operation(pool, "arrive")(back)
    assert torch.equal(back, x)


def broken(*_: Any) -> int:
    raise OSError(5, "Input/output error")


def test_an_error_under_way_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    pool, x = disk.use(tmp_path, GB), torch.ones(5000)
    with patch.object(disk.os, "pwrite", broken):
        token = operation(pool, "start")(x, (1,))
        with pytest.raises(disk.DiskError, match=r"cannot write 20\.00 KB"):
            operation(pool, "drain")(x, token, (1,))
    landed = operation(pool, "drain")(x, operation(pool, "start")(x, (1,)), (1,))
    with patch.object(disk.os, "preadv", broken):
        back = operation(pool, "fetch")(landed, x.shape, (1,), x.dtype)
        with pytest.raises(disk.DiskError, match="cannot read saved"):
            operation(pool, "arrive")(back)
    del token, landed
    gc.collect()
    assert (pool.held, pool.slots) == (0, {})
