from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import memopt
from memopt.facts import cost_key
from memopt.runtime import opcache
from memopt.runtime.opcost import LONG, PATIENT, OpCost, OpCosts, least
from memopt.runtime.opinputs import real_arguments
from memopt.runtime.trace import record

CPU = torch.device("cpu")


def nodes(run: Callable[..., Any], *args: Tensor) -> list[fx.Node]:
    graph = make_fx(run, tracing_mode="fake")(*args).graph
    return [node for node in graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)]


def node(name: str, run: Callable[..., Any], *args: Tensor) -> fx.Node:
    return next(found for found in nodes(run, *args) if name in str(found.target))


def cost(name: str, run: Callable[..., Any], *args: Tensor) -> OpCost:
    found = OpCosts(CPU, cache=None).measure(node(name, run, *args))
    assert found is not None
    return found


def grads(run: Callable[..., Tensor], *args: Tensor) -> Callable[..., Any]:
    return lambda *given: torch.autograd.grad(run(*given).float().sum(), [a for a in given if a.requires_grad])


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def test_a_product_needs_no_workspace() -> None:
    found = cost("mm", torch.mm, torch.randn(64, 128), torch.randn(128, 32))
    assert (found.workspace, found.out_bytes) == (0, 4 * 64 * 32)
    assert found.seconds > 0


def test_softmax_and_views() -> None:
    found = cost("softmax", lambda x: x.softmax(-1), torch.randn(64, 64))
    assert (found.workspace, found.out_bytes) == (0, 4 * 64 * 64)
    view = cost("view", lambda x: x.view(-1), torch.randn(64, 64))
    assert (view.workspace, view.out_bytes) == (0, 0)


def test_layer_norm_backward_adds_up_in_one_row_a_thread() -> None:
    x, w, b = leaf(256, 64), leaf(64), leaf(64)
    run = grads(lambda x, w, b: F.layer_norm(x, (64,), w, b))
    found = cost("native_layer_norm_backward", run, x, w, b)
    assert found.out_bytes == 4 * (256 * 64 + 64 + 64)
    copied = 4 * 256 * 64  # the gradient of a sum has stride 0: the kernel makes a dense copy first
    assert found.workspace == copied + torch.get_num_threads() * 2 * 64 * 4


@pytest.fixture
def no_mkldnn() -> Iterator[None]:
    """torch.backends.mkldnn.flags would do, but warns about TF32."""
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(True)


@pytest.mark.usefixtures("no_mkldnn")
def test_the_columns_of_a_convolution_are_its_workspace() -> None:
    """Without oneDNN a 3 x 3 convolution unfolds each position into 9 values a channel."""
    args = (torch.randn(2, 4, 16, 16), torch.randn(8, 4, 3, 3))
    found = cost("convolution.", lambda x, w: F.conv2d(x, w, padding=1), *args)
    assert (found.workspace, found.out_bytes) == (4 * 2 * (4 * 9) * 16 * 16, 4 * 2 * 8 * 16 * 16)


def test_workspace_is_what_a_trace_of_the_real_convolution_shows() -> None:
    x, w = leaf(8, 16, 32, 32), leaf(32, 16, 3, 3)
    found = cost("convolution.", lambda x, w: F.conv2d(x, w, padding=1), x.detach(), w.detach())
    kept: list[Tensor] = []
    trace = record(lambda: kept.append(F.conv2d(x.detach(), w.detach(), padding=1)))
    assert found.out_bytes == trace.levels[-1] == kept[0].nbytes
    assert found.workspace == trace.peak() - kept[0].nbytes


@pytest.mark.parametrize(
    ("name", "run", "args"),
    [
        ("convolution_backward", grads(lambda x, w: F.conv2d(x, w)), (leaf(2, 4, 8, 8), leaf(4, 4, 3, 3))),
        ("flash_attention_for_cpu.", F.scaled_dot_product_attention, (torch.randn(1, 2, 64, 16),) * 3),
        ("flash_attention_for_cpu_backward", grads(F.scaled_dot_product_attention), (leaf(1, 2, 64, 16),) * 3),
        ("batch_norm", lambda x: F.batch_norm(x, None, None, training=True), (torch.randn(8, 4, 6, 6),)),
        ("cat", lambda x, y: torch.cat([x, y]), (torch.randn(3, 4), torch.randn(5, 4))),
        ("split", lambda x: x.split(2), (torch.randn(6, 4),)),
        ("expand", lambda x: x.expand(4, 5), (torch.randn(4, 1),)),
        ("add.Tensor", lambda x: x.expand(4, 5) + 1, (torch.randn(4, 1),)),
        ("where", lambda m, x: torch.where(m, x, 0.0), (torch.ones(4, 4, dtype=torch.bool), torch.randn(4, 4))),
        ("mm", torch.mm, (torch.randn(8, 8).bfloat16(), torch.randn(8, 8).bfloat16())),
    ],
)
def test_operations_run_and_make_the_bytes_their_fakes_say(name: str, run: Any, args: Any) -> None:
    found = node(name, run, *args)
    measured = OpCosts(CPU, cache=None).measure(found)
    values = found.meta["val"] if isinstance(found.meta["val"], list | tuple) else [found.meta["val"]]
    given = {arg.meta["val"].untyped_storage()._cdata for arg in found.all_input_nodes}
    fresh = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor)}
    assert measured is not None
    assert measured.out_bytes == sum(nbytes for storage, nbytes in fresh.items() if storage not in given)
    assert measured.workspace >= 0


INDEXED: list[tuple[str, Any, tuple[Tensor, ...]]] = [
    ("embedding.", lambda i, w: F.embedding(i, w), (torch.zeros(64, dtype=torch.int64), torch.randn(50, 4))),
    (
        "embedding_dense_backward",
        lambda g, i: torch.ops.aten.embedding_dense_backward(g, i, 50, -1, False),
        (torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)),
    ),
    ("nll_loss_forward", lambda x, t: F.nll_loss(x, t), (torch.randn(64, 50), torch.zeros(64, dtype=torch.int64))),
    ("gather", lambda x, i: x.gather(1, i), (torch.randn(64, 50), torch.zeros(64, 7, dtype=torch.int64))),
    ("index.Tensor", lambda x, i: x[i], (torch.randn(50, 4), torch.zeros(64, dtype=torch.int64))),
    (
        "index_put",
        lambda x, i, v: x.index_put([i], v),
        (torch.randn(50, 4), torch.zeros(64, dtype=torch.int64), torch.randn(64, 4)),
    ),
    ("index.Tensor", lambda x, i: x[:, i], (torch.randn(3, 50), torch.zeros(64, dtype=torch.int64))),
]


@pytest.mark.parametrize(("name", "run", "args"), INDEXED)
def test_indices_are_drawn_over_the_whole_range_and_never_beyond(name: str, run: Any, args: Any) -> None:
    found = node(name, run, *args)
    given, _ = real_arguments(found, CPU)
    flat = [leaf for arg in given for leaf in (arg if isinstance(arg, list | tuple) else [arg])]
    (index,) = [a for a in flat if isinstance(a, Tensor) and a.dtype is torch.int64]
    assert index.unique().numel() > 10
    assert index.min() >= 0
    assert index.max() < 50
    assert OpCosts(CPU, cache=None).measure(found) is not None


def test_unknown_integers_are_zero() -> None:
    (given, _) = real_arguments(node("add", lambda i: i + 1, torch.ones(5, dtype=torch.int64)), CPU)
    assert given[0].tolist() == [0] * 5


def test_strides_are_those_of_the_graph() -> None:
    found = node("add", lambda x: x.t().expand(3, 4, 5) + 1, torch.randn(5, 4))
    (given, _) = real_arguments(found, CPU)
    assert given[0].shape == (3, 4, 5)
    assert given[0].stride() == (0, 1, 4)


def test_equal_operations_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = OpCosts(CPU, cache=None)
    found = nodes(lambda x: x.exp() + x.exp(), torch.randn(4, 4))
    first = costs.measure(found[0])
    monkeypatch.setattr(costs, "_measured", lambda node: pytest.fail("measured again"))
    assert cost_key(found[0]) == cost_key(found[1])
    assert costs.measure(found[1]) is first


def test_a_remembered_cost_that_is_unlikely_is_measured_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 256 x 64 x 32 stood at 9.7 ms in a cache filled on a busy machine, and cost plans for good."""
    (found,) = nodes(torch.mm, torch.randn(256, 64), torch.randn(64, 32))
    costs, key = OpCosts(CPU, cache=None), cost_key(found)
    taken: list[float] = [4e-3, 1e-3]
    monkeypatch.setattr(costs, "_measured", lambda node: OpCost(taken.pop(), 7, 8))
    for seconds, again in ((9.7e-3, 1e-3), (7e-4, 7e-4)):
        costs.known = {key: OpCost(seconds, 0, 8)}
        costs.again.clear()
        assert costs.measure(found) == costs.measure(found) == (OpCost(again, 7 * (again < seconds), 8))
    costs.known = {key: OpCost(2e-3, 0, 8)}
    costs.again.clear()
    assert costs.measure(found) == OpCost(2e-3, 7, 8)  # the second time was longer: other programs only add
    costs.seconds_limit = 0.0
    costs.again.clear()
    assert costs.measure(found) == OpCost(2e-3, 7, 8)


def test_a_least_time_that_stands_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 5.0, 9.0, 9.0, 9.0, 3.0, 9.0, 2.9, 9.0])
    monkeypatch.setattr("memopt.runtime.opcost._seconds", lambda run, device: next(times))
    assert least(lambda: None, CPU) == 2.9
    monkeypatch.setattr("memopt.runtime.opcost._seconds", lambda run, device: 2.0 ** -len(asked.append(0) or asked))
    asked: list[int] = []
    least(lambda: None, CPU)
    assert len(asked) == PATIENT


def test_what_cannot_be_run_has_no_cost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "memopt")
    found = node("mm", torch.mm, torch.randn(4, 4), torch.randn(4, 4))
    found.args = (found.args[0], None)
    costs = OpCosts(CPU, cache=None)
    assert costs.measure(found) is None
    assert any("no cost of aten.mm" in record.getMessage() for record in caplog.records)
    assert list(costs.refused) == [cost_key(found)]


def test_limits() -> None:
    found = node("exp", torch.exp, torch.randn(1024))
    needs = 2 * 4 * 1024
    assert OpCosts(CPU, cache=None, byte_limit=needs).measure(found) is not None
    over = OpCosts(CPU, cache=None, byte_limit=needs - 1)
    assert over.measure(found) is None
    assert "over the limit" in next(iter(over.refused.values()))
    assert OpCosts(CPU, cache=None, seconds_limit=0.0).measure(found) is None


def test_no_more_memory_than_one_operation_needs() -> None:
    found = nodes(lambda x: (x.exp() * 2).sin(), torch.randn(256, 256))
    trace = record(lambda: [real_arguments(n, CPU) and None for n in found])
    assert trace.peak() == 4 * 256 * 256


def test_the_random_generator_is_as_before() -> None:
    state = torch.get_rng_state()
    OpCosts(CPU, cache=None).measure(node("exp", torch.exp, torch.randn(64)))
    torch.set_rng_state(state)
    want = torch.rand(3)
    torch.set_rng_state(state)
    OpCosts(CPU, cache=None).measure(node("exp", torch.exp, torch.ones(64)))
    assert torch.equal(torch.rand(3), want)


def test_it_measures_under_a_fake_mode_too() -> None:
    found = node("mm", torch.mm, torch.randn(4, 4), torch.randn(4, 4))
    with FakeTensorMode():
        measured = OpCosts(CPU, cache=None).measure(found)
    assert measured is not None
    assert measured.out_bytes == 64


def test_costs_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("memopt.runtime.opcost.DOUBT", LONG)
    found, other = nodes(lambda x: x.exp().sin(), torch.randn(4, 4))
    with OpCosts(CPU) as costs:
        first = costs.measure(found)
    with OpCosts(CPU) as costs:
        costs.measure(other)
    again = OpCosts(CPU)
    assert again.known == {cost_key(found): first, cost_key(other): again.known[cost_key(other)]}
    assert again.measure(found) == first
    assert again.spent == 0.0
    (file,) = (tmp_path / "opcosts").iterdir()
    assert torch.__version__ in file.name
    assert f"memopt-{memopt.__version__}" in file.name, "operations of memopt's own may have changed"
    assert f"{torch.get_num_threads()}-threads" in file.name


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 99, "costs": {}}', '{"schema": 2, "costs": {"a": [1]}}'])
def test_a_damaged_cache_is_ignored_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "costs.json"
    file.write_text(damage)
    costs = OpCosts(CPU, cache=file)
    assert costs.known == {}
    assert "damaged cost cache" in caplog.text
    costs.measure(node("exp", torch.exp, torch.randn(4)))
    costs.save()
    assert len(json.loads(file.read_text())["costs"]) == 1


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    opcache.save(file, {"a": (1.0, 2, 3)})
    with pytest.raises(TypeError):
        opcache.save(file, {"b": (object(), 2, 3)})  # type: ignore[dict-item]
    assert opcache.load(file) == {"a": (1.0, 2, 3)}
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


def test_measure_all_takes_the_largest_first() -> None:
    found = nodes(lambda x: (x.exp(), x[:2].sin()), torch.randn(64, 64))
    costs = OpCosts(CPU, cache=None)
    table = costs.measure_all(found)
    assert set(table) == {cost_key(n) for n in found}
    assert "exp" in next(iter(costs.known))
