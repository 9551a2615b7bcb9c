"""Emitted kernels: as near to fp64 as the operations they replace, in odd shapes and types; their text is as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from memopt.kernels import fewbit, fp8, generated, pack_bits, quantise  # noqa: F401  # their operations
from memopt.kernels.emit.families import FAMILIES, inputs_of, region
from memopt.kernels.emit.indices import Unreadable, contiguous, counting, flattened, reshaped, unravelled
from memopt.kernels.emit.layout import WIDEST, WIDEST_SUMMED
from memopt.kernels.emit.primitive import primitive
from memopt.kernels.emit.source import Source, written
from memopt.kernels.generated import GENERATED, KERNELS, Kernel

SNAPSHOTS = Path(__file__).parent / "snapshots"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
# (B, S, C, F, D): the smallest, odd ones, and rows longer than a tile.
SIZES = ((1, 1, 8, 8, 8), (2, 3, 24, 40, 8), (1, 37, 100, 33, 20), (3, 5, 2600, 7, 26))
SHOWN = (2, 8, 64, 96, 16)
FLOOR = 0.25  # of a unit in the last place: below it, which of two roundings is nearer is chance
TYPES = (torch.float32, torch.float16)  # the interpreter cuts bfloat16 off where a GPU rounds


def kernel_of(name: str, inputs: Sequence[Tensor], folder: Path) -> Kernel:
    module, source = region(name, inputs)
    return Kernel(source, module, folder)


def errors(kernel: Kernel, inputs: Sequence[Tensor], run: Callable[..., Any]) -> list[tuple[float, float]]:
    """Of each result: how far the kernel's and the operations' are from fp64, relative."""
    exact = run(*(x.double() for x in inputs))
    exact = exact if isinstance(exact, tuple) else (exact,)
    ours = kernel.launch([x.to(DEVICE) for x in inputs])
    if run is FAMILIES["layer_norm_backward"].run and inputs[0].dtype is torch.float16:  # which a CPU does not have
        theirs = [x.to(torch.float16) for x in run(*(x.float() for x in inputs))]
    else:
        theirs = kernel.one_by_one(inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    return [(off(one.cpu(), true), off(other, true)) for one, other, true in zip(ours, theirs, exact, strict=True)]


def off(x: Tensor, true: Tensor) -> float:
    return float((x.double() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_as_near_to_fp64_as_its_operations(
    name: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    inputs = inputs_of(name, sizes, dtype)
    for ours, theirs in errors(kernel_of(name, inputs, tmp_path), inputs, FAMILIES[name].run):
        assert ours <= 1.5 * theirs + FLOOR * torch.finfo(dtype).eps, (ours, theirs)


def test_what_is_wrong_is_noticed(tmp_path: Path) -> None:
    inputs = inputs_of("swiglu", SIZES[1], torch.float32)
    kernel = kernel_of("swiglu", inputs, tmp_path)
    wrong = kernel.source.text.replace("1.0 / (1.0 + ", "1.0 / (1.0001 + ")
    assert wrong != kernel.source.text
    source = Source(wrong, kernel.source.layout, kernel.source.results, kernel.source.pointers, 0, 0)
    ((ours, theirs),) = errors(Kernel(source, kernel.region, tmp_path), inputs, FAMILIES["swiglu"].run)
    assert ours > 10 * (1.5 * theirs + FLOOR * torch.finfo(torch.float32).eps)


def source_of(run: Callable[..., Any], *inputs: Tensor) -> tuple[Source, Any]:
    """The kernel of any function, and the function as a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        module = make_fx(run)(*fakes)
        whole: Any = module.graph.output_node().args[0]
        module.graph.output_node().args = (tuple(whole) if isinstance(whole, list | tuple) else (whole,),)
        module.recompile()
        outputs = list(module(*fakes))
    return written(primitive(module, fakes), fakes, outputs, "test"), module


def same(run: Callable[..., Any], *inputs: Tensor, folder: Path) -> str:
    """That the kernel gives what the function does; its text."""
    source, module = source_of(run, *inputs)
    kernel = Kernel(source, module, folder)
    ours, theirs = kernel.launch([x.to(DEVICE) for x in inputs]), kernel.one_by_one(inputs)
    for one, other in zip(ours, theirs, strict=True):
        # sums of up to a hundred terms in another order, and divisions and powers that a GPU rounds by a unit or two
        torch.testing.assert_close(one.cpu(), other, rtol=2e-5, atol=2e-6, equal_nan=True)
        assert one.stride() == other.stride()
    return source.text


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


aten: Any = torch.ops.aten
POINTWISE: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda x, y: (x + 2) * y - x / (y.abs() + 1) + (1 - x),
    "powers": lambda x, y: x**2 + x**3 + y.abs() ** 0.5 + (y.abs() + 1) ** -0.5 + (x.abs() + 1) ** -1,
    "exponentials": lambda x, y: x.exp() + y.abs().add(1).log() + x.sigmoid() + y.tanh() + (x / 50).tanh(),
    "small": lambda x, y: (x * 1e-3).expm1() + (y.abs() * 1e-3).log1p() + torch.expm1(x) + torch.log1p(y.abs()),
    "trigonometry": lambda x, y: x.sin() + y.cos() + torch.erf(x),
    "choices": lambda x, y: torch.where(x > y, x, 2.0) + x.masked_fill(y > 0, -3.0) + torch.where(x == x, y, x),
    "bounds": lambda x, y: x.clamp(-0.5, 0.5) + y.clamp(min=0.1) + x.clamp(max=0.2) + torch.maximum(x, y) + x.relu(),
    "logic": lambda x, y: ((x > 0) & (y > 0) | ~(x < y)).to(torch.float32) + (x != y) * 1.5,
    "integers": lambda x, y: (x > 0).to(torch.int64) * 3 + torch.arange(x.shape[-1]) - (y > 0).to(torch.int32),
    "fills": lambda x, y: torch.full_like(x, 2.0) * y + torch.zeros_like(x) + torch.ones_like(y) * x,
    "activations": lambda x, y: (
        torch.nn.functional.silu(x) + torch.nn.functional.gelu(y) + torch.nn.functional.gelu(x, approximate="tanh")
        + torch.nn.functional.leaky_relu(y) + torch.nn.functional.hardswish(x) + torch.nn.functional.softplus(y)
        + torch.nn.functional.elu(x)
    ),
    "backwards": lambda x, y: (
        aten.silu_backward(x, y) + aten.gelu_backward(x, y) + aten.tanh_backward(x, y.tanh())
        + aten.sigmoid_backward(x, y.sigmoid()) + aten.threshold_backward(x, y, 0)
    ),
    "views": lambda x, y: x.t() + y.t().reshape(-1).view(y.shape[1], y.shape[0]) + x.t().contiguous(),
    "slices": lambda x, y: torch.cat((x[:, 3:], y[:, :3]), 1) + torch.cat((y, x), 0)[x.shape[0] :],
    "scatters": lambda x, y: aten.slice_backward(x[:, :2], list(y.shape), 1, 1, 3, 1) + y,
    "selects": lambda x, y: x[1] * y[0] + x.select(0, 1).unsqueeze(0).expand(2, -1)[1],
    "broadcasts": lambda x, y: x * y[:, :1] + x[:1] + y.unsqueeze(0)[0],
    "several": lambda x, y: (x * y, (x * y).t(), x - 1),
}  # fmt: skip
ROWS: dict[str, Callable[..., Any]] = {
    "sums": lambda x, y: x - x.sum(-1, keepdim=True) * y,
    "means": lambda x, y: (x - x.mean(-1, keepdim=True)).to(torch.float32) + y.mean(1, keepdim=True),
    "extremes": lambda x, y: x - x.amax(-1, keepdim=True) + y.amin(-1, keepdim=True),
    "variance": lambda x, y: torch.var_mean(x, -1, correction=1, keepdim=True)[0] * y + x.var(1, keepdim=True),
    "softmax": lambda x, y: torch.softmax(x * y, -1),
    "log_softmax": lambda x, y: torch.log_softmax(x, -1) - y,
    "softmax_backward": lambda x, y: aten._softmax_backward_data(x, torch.softmax(y, -1), -1, torch.float32),
    "over rows": lambda x, y: ((x * y).sum(0), x + y),
    "both": lambda x, y: (x * (x * y).sum(-1, keepdim=True), (x * y).sum(0), y.sum(0, keepdim=True)),
    "of columns": lambda x, y: (x[:1] * 2 + y, (x[:1] + 0 * y).sum(0)),
    "ones over rows": lambda x, y: ((x * 0 + 1).sum(0), x + y),
    "kept": lambda x, y: (x.sum(-1), x.mean(-1, keepdim=True) * y),
    "rows of a view": lambda x, y: (x.t() * y.t()).t().sum(-1, keepdim=True) + x,
}
SHAPES = ((2, 5), (4, 64), (33, 100), (70, 7))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*POINTWISE, *ROWS])
def test_operations(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    run = (POINTWISE | ROWS)[name]
    same(run, values(*shape), values(shape[0], shape[1]) + 0.5, folder=tmp_path)


def test_sums_of_a_number_are_itself(tmp_path: Path) -> None:
    """In a region of rows and in one of elements: a loss that is averaged once more."""
    one = torch.tensor(3.0)
    same(lambda x, s: x - x.sum(-1, keepdim=True) + s.mean() * s.sum(), values(3, 5), one, folder=tmp_path)
    same(lambda x, s: x * s.mean() + s.sum(), values(3, 5), one, folder=tmp_path)


def test_numbers_alone_are_computed_with(tmp_path: Path) -> None:
    same(
        lambda x, y: x * -torch.ones_like(x) + (1.0 - torch.zeros_like(y)), values(3, 5), values(3, 5), folder=tmp_path
    )
    same(lambda x: x.sum(-1, keepdim=True) * -torch.ones_like(x), values(3, 5), folder=tmp_path)


def test_nothing_is_read_beyond_a_part_that_stands_twice_in_a_concatenation(tmp_path: Path) -> None:
    text = same(lambda x: torch.cat((x, x), -1) * 2, values(3, 5), folder=tmp_path)
    loads = [line for line in text.splitlines() if "tl.load" in line]
    assert len(loads) == 2
    assert "% 10 < 5" in loads[0]
    assert "% 10 >= 5" in loads[1]


def test_the_largest_of_what_is_no_number_is_none(tmp_path: Path) -> None:
    x = values(3, 5)
    x[0, 2] = float("nan")
    same(lambda x: x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True), x, folder=tmp_path)


def test_another_text_under_the_same_name_is_written_anew(tmp_path: Path) -> None:
    inputs = inputs_of("swiglu", SIZES[1], torch.float32)
    kernel = kernel_of("swiglu", inputs, tmp_path)
    kernel.path.write_text("kernel = None")
    assert all(map(torch.isfinite, kernel.launch([x.to(DEVICE) for x in inputs])[0].flatten()))
    assert kernel.path.read_text() == kernel.source.text


def test_what_is_not_a_number_stays_so(tmp_path: Path) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, 80.0, -80.0]])
    same(lambda x: (x.relu(), x.clamp(-1, 1), torch.maximum(x, -x), x.tanh(), x.expm1()), x, folder=tmp_path)
    same(lambda x: torch.log1p(x.abs()), x, folder=tmp_path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_types_of_inputs_and_results(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.tensor([[0, 1, 1, 0, 1]]).to(dtype)
    same(lambda x, y: (x * y, (y > 0).to(dtype), x.to(torch.float32) + y), x, values(1, 5), folder=tmp_path)


def test_strides_and_gaps_of_inputs(tmp_path: Path) -> None:
    x, y = values(6, 40)[:, 3:35:2], values(16, 6).t()
    same(lambda x, y: (x * y, x.sum(-1, keepdim=True) * y), x, y, folder=tmp_path)
    same(lambda x, y: torch.softmax(x + y, -1), x, y, folder=tmp_path)


@pytest.mark.parametrize("codec", ["bits", "fp8", "int8", "int4", "int2", "int8_64", "int4_128"])
@pytest.mark.parametrize("turned", [False, True])
def test_saved_values_are_unpacked_where_they_are_read(codec: str, turned: bool, tmp_path: Path) -> None:
    """Bit for bit what the operation makes, times two: a product and a sum are rounded apart, as a GPU is told to."""
    x = values(12, 100).t() if turned else values(100, 12)
    x = x > 0 if codec == "bits" else x
    pack, unpack = (getattr(torch.ops.memopt, f"{way}_{codec}") for way in ("pack", "unpack"))
    packed = pack(x, x.stride())

    def run(packed: Tensor, y: Tensor) -> Tensor:
        return unpack(packed, x.shape, x.stride(), x.dtype) * 2 * y

    text = same(run, packed, torch.ones_like(x, dtype=torch.float32), folder=tmp_path)
    assert text.count("tl.load(x0_ptr") > 0


@pytest.mark.parametrize("count", [8, 9, 1000, 1024, 3000])
def test_masks_are_packed_where_they_are_made(count: int, tmp_path: Path) -> None:
    x = values(count)
    pack = torch.ops.memopt.pack_bits
    same(lambda x: (pack(x > 0, [1]), x.relu()), x, folder=tmp_path)
    same(lambda x: pack(x.sin() > 0.5, [1]), x, folder=tmp_path)
    turned = values(count, 3).t()
    same(lambda x: (pack(x > 0, x.stride()), x * 2), turned, folder=tmp_path)


def test_a_row_is_read_once_however_many_sums_it_goes_into(tmp_path: Path) -> None:
    text = same(FAMILIES["layer_norm_backward"].run, *inputs_of("layer_norm_backward", SHOWN, torch.float32),
                folder=tmp_path)  # fmt: skip
    assert text.count("tl.load(x0_ptr") == text.count("tl.load(x1_ptr") == 1


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "products": (lambda x, y: x @ y.t(), "mm"),
    "a sum of columns read again": (lambda x, y: x - x.sum(0), "results of several sizes|no row"),
    "rows of two lengths": (lambda x, y: (x.sum(-1), y[:, :3].sum(-1)), "several lengths"),
    "lookups": (lambda x, y: x.index_select(0, (y[:2, 0] > 0).long()), "index"),
    "powers of others": (lambda x, y: x**y, "power"),
    "remainders": (lambda x, y: torch.remainder(x, y), "remainder"),
    "integer division": (lambda x, y: torch.div(x, y, rounding_mode="floor"), "options|floor"),
    "booleans added up": (lambda x, y: ((x > 0) + (y > 0)) * 1.0, "add of torch.bool"),
    "bytes that wrap around": (lambda x, y: (x.to(torch.uint8) + 200).float(), "wrap around|uint8"),
    "whole numbers rounded": (lambda x, y: x.to(torch.int32).floor() + y, "floor of torch.int32"),
    "bounds that are values": (lambda x, y: x.clamp(y), "bounds"),
    "the largest of integers": (lambda x, y: x.to(torch.int64).amax(-1, keepdim=True) + y, "integers"),
    "integers over rows": (lambda x, y: (x.to(torch.int64).sum(0), x + y), "integers|several sizes"),
    "sums cut off": (lambda x, y: ((x * 9).sum(0).to(torch.int32).to(torch.float32), x + y), "several sizes"),
    "comparisons that round": (lambda x, y: (x.half() == 0.1) * y, "rounds first"),
    "infinite integers": (lambda x, y: torch.full_like(x, float("inf")).to(torch.int64) + y, "integer that is none"),
    "fp64": (lambda x, y: x.double() * y, "float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_is_written_for_is_refused_with_the_reason(name: str) -> None:
    run, why = REFUSED[name]
    with pytest.raises(Unreadable, match=why):
        source_of(run, values(4, 6), values(4, 6))


@pytest.mark.parametrize(("length", "summed", "taken"), [
    (WIDEST, False, True), (WIDEST + 1, False, False), (WIDEST_SUMMED, True, True), (WIDEST_SUMMED + 1, True, False),
])  # fmt: skip
def test_rows_are_as_long_as_registers_hold(length: int, summed: bool, taken: bool) -> None:
    def run(x: Tensor) -> Any:
        return (x - x.sum(-1, keepdim=True), x.sum(0)) if summed else x - x.sum(-1, keepdim=True)

    if taken:
        source_of(run, torch.empty(2, length))
        return
    with pytest.raises(Unreadable, match=f"rows of {length}"):
        source_of(run, torch.empty(2, length))


# indices


PIECES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)


@given(PIECES, st.data())
@settings(max_examples=200)
def test_following_views_finds_the_element_that_torch_has_there(shape: list[int], data: st.DataObject) -> None:
    """Chains of permutes and reshapes, followed from the last view back, as kernels are written."""
    source, module = source_of(lambda x: _viewed(x, shape, data) + 1.0, torch.arange(float(torch.Size(shape).numel())))
    x = torch.arange(float(torch.Size(shape).numel()))
    with tempfile.TemporaryDirectory() as folder:
        kernel = Kernel(source, module, Path(folder))
        assert torch.equal(kernel.launch([x.to(DEVICE)])[0].cpu(), kernel.one_by_one([x])[0])


def _viewed(x: Tensor, shape: list[int], data: st.DataObject) -> Tensor:
    """What is drawn; splits are along the factors that the shape has, which digits follow."""
    seen = x.view(shape)
    for _ in range(data.draw(st.integers(1, 3))):
        seen = seen.permute(*data.draw(st.permutations(range(seen.dim()))))
        joined = data.draw(st.integers(0, seen.dim() - 1))
        if joined:
            sizes = tuple(seen.shape)
            merged = (*sizes[: joined - 1], sizes[joined - 1] * sizes[joined], *sizes[joined + 1 :])
            seen = seen.reshape(merged)
            if data.draw(st.booleans()):
                seen = seen.reshape(sizes)
    return seen


@given(PIECES, PIECES)
@settings(max_examples=200)
def test_a_reshape_is_followed_or_refused(shape: list[int], other: list[int]) -> None:
    if torch.Size(shape).numel() != torch.Size(other).numel():
        return
    count = torch.Size(shape).numel()
    index = unravelled(counting("at", count), tuple(shape))
    try:
        found = reshaped(index, tuple(shape), tuple(other))
    except Unreadable:
        return
    at = torch.arange(count)
    address = eval(flattened(found, contiguous(tuple(other))).text(), {}, {"at": at})
    assert torch.equal(torch.as_tensor(address).expand(count), at)


# the operation


def test_the_operation_is_well_defined(tmp_path: Path) -> None:
    inputs = inputs_of("rms_norm", SIZES[1], torch.float32)
    kernel = kernel_of("rms_norm", inputs, tmp_path)
    KERNELS[kernel.source.key] = kernel
    torch.library.opcheck(GENERATED, (inputs, kernel.source.key), test_utils=("test_schema", "test_faketensor"))


def test_without_a_gpu_the_operations_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of("rms_norm", SIZES[1], torch.float32)
    kernel = kernel_of("rms_norm", inputs, tmp_path)
    KERNELS[kernel.source.key] = kernel
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(generated.Kernel, "launch", None)
    found = GENERATED(inputs, kernel.source.key)
    assert all(map(torch.equal, found, FAMILIES["rms_norm"].run(*inputs)))


# text


def shown(name: str) -> str:
    dtype = torch.bfloat16
    return region(name, inputs_of(name, SHOWN, dtype))[1].text


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_text_is_as_it_was(name: str) -> None:
    """`python -m tests.kernels.test_emit` writes them anew, for a reader to compare."""
    assert (SNAPSHOTS / f"{name}.triton").read_text(encoding="utf-8") == shown(name)


def test_the_text_depends_on_nothing_but_the_region() -> None:
    code = "from tests.kernels.test_emit import shown; print(shown('layer_norm_backward'), end='')"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == shown("layer_norm_backward")


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for each in FAMILIES:
        (SNAPSHOTS / f"{each}.triton").write_text(shown(each), encoding="utf-8")
