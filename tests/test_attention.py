"""Attention, however it is spelled, becomes one operation that keeps no probabilities, as near to fp64 as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from memopt.forward import Forward, rewritten
from memopt.passes.attention import Attention

B, H, S, D = 2, 4, 64, 8
SCALE = 1 / math.sqrt(D)
ATEN = torch.ops.aten
CAUSAL = [None, 0]


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE, -1) @ v


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q / math.sqrt(D)) @ k.mT).softmax(dim=3).matmul(v)


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    return torch.bmm(torch.nn.functional.softmax(torch.bmm(q, k.transpose(1, 2)).div(math.sqrt(D)), 2), v)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(S, dtype=q.dtype).div(S).expand(B * H, 1, S)
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    s = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=SCALE)
    return s.view(B, H, S, S).softmax(-1).view(B * H, S, S).bmm(v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * torch.tensor(SCALE)
    return torch.einsum("bhqk,bhkd->bqhd", torch.nn.Softmax(-1)(s), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(torch.einsum("bhkd,bhqd->bhkq", k, q) * SCALE, dim=2)
    return torch.einsum("bhkq,bhkd->bhqd", p, v)


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).float().softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.triu(torch.ones(S, S, dtype=torch.bool), diagonal=1)
    return (q @ k.mT * SCALE).masked_fill(mask, float("-inf")).softmax(-1) @ v


def added_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + torch.full((S, S), -torch.inf, dtype=q.dtype).triu(1)).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(S)
    return torch.where(i[None, :] <= i[:, None], q @ k.mT * SCALE, torch.finfo(q.dtype).min).softmax(-1) @ v


def arithmetic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(S)
    return (q @ k.mT * SCALE + (1.0 - (i[:, None] >= i).to(q.dtype)) * -1e9).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(S)
    near = (i[:, None] >= i[None, :]) & ~(i[:, None] - i[None, :] >= 7)
    return (q @ k.mT * SCALE).masked_fill(torch.logical_not(near), -torch.inf).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(H)], dtype=q.dtype).view(H, 1, 1)
    i = torch.arange(S)
    bias = (i[None, :] - i[:, None]).abs().neg() * slopes
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(q @ k.mT * SCALE / 5.0) * 5.0
    return s.masked_fill(torch.ones(S, S).tril() == 0, -torch.inf).softmax(-1) @ v


def expanded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2, None].expand(B, 2, 2, S, D).reshape(B, H, S, D) for x in (k, v))
    return matmul(q, k, v)


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
    return matmul(q, k, v)


def tiled_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat(1, 2, 1, 1) for x in (k, v))
    return matmul(q, k, v)


def grouped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(B, 2, 2, S, D)
    s = torch.einsum("bgrqd,bgkd->bgrqk", q, k[:, :2]) * SCALE
    return torch.einsum("bgrqk,bgkd->bgrqd", s.softmax(-1), v[:, :2]).reshape(B, H, S, D)


def one_head_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:, :1].mT * SCALE).softmax(-1) @ v[:, :1]


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).reshape(B, S, H * D) for x in (q, k, v))
    return (q @ k.mT / 6).softmax(-1) @ v


WHOLE = (matmul, scaled_queries, bmm, einsum, keys_first, widened, triangle, added_triangle, chosen, arithmetic,
         one_head)  # fmt: skip
CHUNKED = (baddbmm, window, alibi, soft_cap, expanded_heads, repeated_heads, tiled_heads, grouped_heads, one_head_of_keys)
SQUARES = {"triangle", "added_triangle"}  # the user's own, whose making is dead by then


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, S, H, D, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def results(function: Any, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and every gradient, in fp64, as computed in the dtype."""
    own = [x.detach().to(dtype if x.is_floating_point() else x.dtype).requires_grad_(x.requires_grad) for x in given]
    out = function(*own)
    wanted = [x for x in own if x.requires_grad]
    return [x.detach().double() for x in (out, *torch.autograd.grad(out.square().sum(), wanted))]


def replaced(function: Any, *given: Tensor) -> tuple[Any, fx.GraphModule, list[str]]:
    """(the function as rewritten, its graph, why each place was left alone)."""
    found: list[Any] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        found.append(rewritten(module, [Attention]))
        return found[0].module

    torch._dynamo.reset()
    made = torch.compile(function, backend=backend, dynamic=False)
    made(*given)
    return made, found[0].module, [site.refused for site in found[0].found["attention"]]


def squares(module: fx.GraphModule) -> list[str]:
    """Nodes over queries and keys."""
    shapes = [(node.name, list(node.meta["val"].shape)) for node in module.graph.nodes if node.op == "call_function"
              and isinstance(node.meta.get("val"), Tensor)]  # fmt: skip
    return [name for name, shape in shapes if shape[-2:] == [S, S]]


def attention_of(module: fx.GraphModule) -> list[Any]:
    ops = (ATEN.scaled_dot_product_attention.default, torch.ops.memopt.chunked_attention.default)
    return [node.target for node in module.graph.nodes if node.target in ops]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [*WHOLE, *CHUNKED])
def test_every_spelling_is_found(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    given = inputs(dtype)
    made, module, refused = replaced(function, *given)
    assert refused == [""]
    assert attention_of(module) == [
        ATEN.scaled_dot_product_attention.default if function in WHOLE else torch.ops.memopt.chunked_attention.default
    ]
    assert not squares(module)
    assert not Attention.run(Forward(module))
    want = results(function, given, torch.float64)
    was, now = (results(each, given, dtype) for each in (function, made))
    for w, a, b in zip(want, was, now, strict=True):
        before, after = (float((x - w).norm() / w.norm()) for x in (a, b))
        assert after <= 1.5 * before
