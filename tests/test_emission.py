"""Regions of a program as kernels: found by what they move, predicted by the photograph, held by the step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError

import memopt
from memopt import emission
from memopt.emission import beating_inductor, emitted, kernels_of, regions
from memopt.generation import KERNELS as NAME
from memopt.kernels import generated
from memopt.lowering import lower
from memopt.merged import Region, harmless, merged, standing
from memopt.photograph import photograph
from memopt.pipeline import prepare
from memopt.planned import in_kernels
from memopt.program import Program
from memopt.timeline import peak
from tests.test_program import BINARY, UNARY, WIDTH, Toy, gradients

ON = f"+{NAME}"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's functions hold what they were given in cycles, which a launch on a GPU does not."""
    launch = generated.Kernel.launch

    def collected(self: generated.Kernel, inputs: Sequence[Tensor]) -> list[Tensor]:
        made = launch(self, inputs)
        gc.collect()
        return made

    monkeypatch.setattr(generated.Kernel, "launch", collected)


class Block(nn.Module):
    """A norm, a gated product and a sum: what transformers are made of."""

    def __init__(self, width: int = 32, inner: int = 96) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Tower(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def captured(model: nn.Module, x: Tensor) -> Program:
    """The program that the eager lowering plans."""
    found: list[Program] = []

    def keep(program: Program) -> Program:
        found.append(prepare("eager")(program))
        return found[-1]

    torch._dynamo.reset()
    lowered(model, keep)(x).backward()
    model.zero_grad(set_to_none=True)
    return found[0]


def lowered(model: nn.Module, transform: Callable[[Program], Program]) -> Callable[..., Any]:
    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lower(module, inputs, {}, transform)

    compiled: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False)
    return compiled


def told(region: Region) -> str:
    """What is fused, and its results."""
    title = generated.KERNELS[region.key].source.text.split('"""')[1].split(":")[0]
    return f"{title} -> {', '.join(region.writes)}"


def test_the_regions_of_a_gated_block() -> None:
    """Norm, gate and sum of the forward; in the backward, what surrounds each product is one kernel."""
    program = captured(Tower(1), torch.randn(4, 8, 32))
    assert [told(region) for region in regions(program)] == [
        "silu, mul -> silu, mul",
        "add, pow, mean -> add, mean",
        "div, pow, mul, mul, sum -> mul_2, sum_1",
        "mul, mul, sum, silu_backward, sum -> mul_3, sum_2, silu_backward, sum_3",
        "add, native_layer_norm_backward -> getitem_4, getitem_5",
    ]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, len(UNARY) + len(BINARY)), st.integers(0, 9), st.integers(0, 9)),
        min_size=2, max_size=9,
    )
)  # fmt: skip
def test_the_photograph_is_as_predicted_and_the_step_computes_the_same(ops: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Toy(ops), torch.randn(4, WIDTH)
    seen: list[int] = []

    def transform(program: Program) -> Program:
        program = prepare("eager")(program)
        before = photograph(program)
        found = regions(program)
        changed = in_kernels(program, found)  # raises if the photograph is not the predicted one
        assert photograph(program).steps_alike(before)  # what was given is as it was
        kept = harmless(before, found, 1)
        for some in (found[::2], found[1::2], found[:1], found[1:]):  # as if others were left out
            in_kernels(program, standing(before, some))
        assert peak(merged(before, kept)) <= peak(before)
        assert peak(photograph(emitted(program, kept))) == peak(merged(before, kept))
        assert all(region.moved < region.apart for region in found)
        seen.append(len(found))
        return changed

    torch._dynamo.reset()
    want = gradients(lowered(model, prepare("eager")), model, x)  # which draws as the step does
    torch._dynamo.reset()
    found = gradients(lowered(model, transform), model, x)
    assert seen
    for one, other in zip(want[:-1], found[:-1], strict=True):
        # as a whole: an element that nearly cancels has the rounding of the largest
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6
    assert torch.equal(want[-1], found[-1])  # the generator


def compiled(budget: int | str, depth: int = 3, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tower(depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"lowering": "eager"} | options
    return memopt.compile(model, budget, optimizer=optimizer, **options), optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses, draw = [], torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(16, 64, 32, generator=draw))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain() -> tuple[int, list[float]]:
    """The step's bytes without kernels, and its losses."""
    model, optimizer = compiled("1GB")
    losses = train(model, optimizer)
    assert model.memopt.plan.kernels == ()  # on a CPU they are what is asked for by name
    return model.memopt.plan.peak, losses


def test_the_step_takes_what_was_predicted(plain: tuple[int, list[float]]) -> None:
    model, optimizer = compiled("1GB", passes=ON)
    losses, plan = train(model, optimizer), model.memopt.plan
    assert model.memopt.measured.peak_bytes == plan.peak <= plain[0]
    assert losses == pytest.approx(plain[1], rel=1e-5)
    (lever,) = (lever for lever in plan.levers if lever.lever == NAME)
    assert (lever.numerics, lever.count > 5, lever.bytes > 0) == ("reordered", True, True)
    assert any("generated kernels in" in note for note in plan.notes)


def test_a_budget_between_is_held_and_less_is_made_again(plain: tuple[int, list[float]]) -> None:
    budget = int(0.7 * plain[0])
    made = {}
    for passes in ("", ON):
        model, optimizer = compiled(budget, passes=passes)
        losses = train(model, optimizer)
        assert model.memopt.measured.peak_bytes <= model.memopt.plan.peak <= budget
        assert losses == pytest.approx(plain[1], rel=1e-5)
        made[passes] = sum(d.seconds for d in model.memopt.plan.decisions if d.lever == "recompute")
    assert made[ON] <= made[""]


def test_what_is_saved_in_bytes_is_unpacked_in_the_kernel_that_reads_it(plain: tuple[int, list[float]]) -> None:
    options = {"allow": ("int8_activations",), "max_grad_error": 1.0}
    model, optimizer = compiled(int(0.75 * plain[0]), passes=f"{ON},-recompute,-stream", **options)
    losses = train(model, optimizer)
    assert losses == pytest.approx(plain[1], rel=1e-2)
    assert model.memopt.measured.peak_bytes <= model.memopt.plan.peak
    titles = [told(region) for region in planned_regions(model)]
    assert any(title.startswith("unpack_int8") and "mul" in title for title in titles)


def planned_regions(model: Any) -> tuple[Region, ...]:
    """Of the latest plan."""
    return tuple(model.memopt._session.latest.kernels)


def test_a_refusal_names_a_floor_that_is_planned_and_one_byte_less_is_refused(unadvised: None) -> None:
    def floor(budget: int) -> int | None:
        model = compiled(budget, passes=ON)[0]
        try:
            model.memopt  # noqa: B018
            model(torch.randn(16, 64, 32)).backward()
        except memopt.BudgetError as refused:
            return refused.floor_bytes
        return None

    least = floor(1)
    assert least is not None
    assert floor(least) is None
    assert floor(least - 1) == least


def test_updates_in_the_backward_stand_behind_the_kernel_that_makes_their_gradient(
    plain: tuple[int, list[float]],
) -> None:
    whole = "-stream,-stream_attention,-recompute"
    with pytest.raises(memopt.BudgetError) as refused:
        compiled(1, passes=whole)[0](torch.randn(16, 64, 32))
    model, optimizer = compiled(refused.value.floor_bytes - 1, update="backward", passes=f"{ON},{whole}")
    losses = train(model, optimizer)
    assert losses == pytest.approx(plain[1], rel=1e-5)
    assert model.memopt.plan.kernels
    assert all(p.grad is None for p in model.parameters())
    assert model.memopt.measured.peak_bytes <= model.memopt.plan.peak


@pytest.mark.parametrize("options", [{"numerics": "exact", "passes": ON}, {"passes": f"{ON},-{NAME}"}])
def test_where_all_is_exact_or_they_are_switched_off_there_are_none(options: dict[str, Any]) -> None:
    model, optimizer = compiled("1GB", **options)
    train(model, optimizer, 1)
    assert model.memopt.plan.kernels == ()


def test_a_plan_for_a_gpu_has_them_by_itself(plain: tuple[int, list[float]]) -> None:
    x = torch.randn(16, 64, 32)
    for passes, some in (("", True), (f"-{NAME}", False)):
        plan = memopt.plan(Tower(3), (x,), budget="1GB", device="h200", lowering="eager", passes=passes)
        assert bool(plan.kernels) == some


def test_the_sources_are_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_DUMP", str(tmp_path))
    model, optimizer = compiled("1GB", passes=ON)
    train(model, optimizer, 1)
    files = sorted(path.stem for path in (tmp_path / "kernels").iterdir())
    assert files
    assert all(generated.KERNELS[key].source.text == (tmp_path / f"kernels/{key}.py").read_text() for key in files)


def test_beside_inductor_stand_those_that_read_once_what_it_would_read_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backwards whose sums over rows Inductor makes in a kernel of their own where rows are few."""
    program = captured(Tower(2), torch.randn(16, 64, 32))
    assert beating_inductor(program) == ()  # all of it lies in a cache
    monkeypatch.setattr(emission, "JOINED_ELEMENTS", 1)
    found = beating_inductor(program)
    assert found
    assert any("native_layer_norm_backward" in told(region) for region in found)
    assert all(generated.KERNELS[region.key].source.moved_by_two > region.moved / 0.9 for region in found)
    monkeypatch.setattr(emission, "JOINED_ROWS", 1)  # of more than twice as many rows as columns: Inductor joins them
    assert beating_inductor(program) == ()


def test_inductors_code_with_kernels_of_ours_holds_the_budget(
    plain: tuple[int, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emission, "JOINED_ELEMENTS", 1)
    ran: list[str] = []
    launch = generated.Kernel.launch
    monkeypatch.setattr(generated.Kernel, "launch", lambda self, x: ran.append(self.source.key) or launch(self, x))
    model, optimizer = compiled("1GB", lowering="inductor", passes=ON)
    losses, plan = train(model, optimizer), model.memopt.plan
    assert losses == pytest.approx(plain[1], rel=1e-5)
    assert ran
    assert plan.kernels[0].count > 3
    assert model.memopt.measured.peak_bytes <= plan.peak * 1.03


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_that_run_several_times_share_their_kernels(plain: tuple[int, list[float]]) -> None:
    class Broken(Tower):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x.square().mean()

    measured = {}
    for passes in ("", ON):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model: Any = Broken()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model = memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager", passes=passes)
        losses = train(model, optimizer)
        measured[passes] = model.memopt.measured.peak_bytes
    assert losses == pytest.approx(plain[1], rel=1e-5)
    assert model.memopt.plan.breaks > 1
    assert model.memopt.plan.kernels[0].count > 6
    assert measured[ON] <= measured[""]


def test_a_kernel_that_the_gpu_here_cannot_run_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from memopt.kernels.emit import build

    program = captured(Tower(1), torch.randn(4, 8, 32))
    every = regions(program)
    title = generated.KERNELS[every[0].key].source.text

    def compiled(kernel: generated.Kernel, capability: int) -> None:
        assert capability == 90
        if kernel.source.text == title:
            raise CompilationError("def kernel(): ...", None, "no such instruction")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "compiled", compiled)
    emission._builds.cache_clear()
    found = regions(program)
    emission._builds.cache_clear()
    assert found == tuple(region for region in every if region.key != every[0].key)
    assert len(found) < len(every)
    assert [record.message for record in caplog.records if "no such instruction" in record.message]


class Turned(nn.Module):
    """A norm of what was transposed, whose result is dense, looked at as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x.transpose(1, 2)).view(-1, 16).sigmoid()).square().mean().mean()


def test_what_torch_does_not_take_apart_is_left_alone() -> None:
    made: dict[str, list[float]] = {}
    for passes in ("", ON):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model: Any = Turned()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model = memopt.compile(model, "1GB", optimizer=optimizer, lowering="eager", passes=passes)
        made[passes] = []
        for _ in range(2):
            loss = model(torch.ones(4, 16, 9))
            loss.backward()
            optimizer.step()
            made[passes].append(loss.item())
    assert made[ON] == pytest.approx(made[""], rel=1e-5)


def test_kernels_of_a_program_are_told() -> None:
    program = captured(Tower(1), torch.randn(4, 8, 32))
    found = regions(program)
    assert kernels_of(program) == []
    assert set(kernels_of(emitted(program, found))) == {region.key for region in found}
