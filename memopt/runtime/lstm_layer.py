"""One direction of one LSTM layer as oneDNN computes it, forward and backward, with the bytes it really takes.

Untraced, torch runs `nn.LSTM` on CPU through `aten.mkldnn_rnn_layer`. That operation cannot stand in a plan as it is:
it trains or infers by the grad mode it is called in (a compiled forward runs without gradients: no workspace), and its
fake tells a workspace of 0 bytes. `memopt::lstm_layer` calls the same kernel in its training form and knows the bytes.

Shapes, as oneDNN wants them: x (T, B, I), h and c (B, H), weights (4 H, I) and (4 H, H), biases (4 H), all contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

LSTM = 2  # ideep::rnn_kind (third_party/ideep/include/ideep/abstract_types.hpp)
PAGE = 4096  # oneDNN starts each part of the workspace on a page (src/cpu/rnn/rnn_utils.hpp, set_offsets)
LINE = 64  # bytes; rows of gates and states are rounded up to it, or as wide as the hidden or the input size

FORWARD = (
    "(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h, Tensor c, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h, Tensor c, bool reverse, Tensor y,"
    " Tensor hy, Tensor cy, Tensor workspace, Tensor? dy, Tensor? dhy, Tensor? dcy)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@contextmanager
def _training() -> Iterator[None]:
    """oneDNN's kernels train, and write a workspace, where gradients are enabled; autograd itself is not to record."""
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        yield


@torch.library.custom_op("memopt::lstm_layer", mutates_args=(), device_types="cpu", schema=FORWARD)
def lstm_layer(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, B, H), the last h and c (B, H), and oneDNN's workspace, which the backward reads."""
    biased, size = b_ih is not None, w_hh.shape[1]
    biases = (b_ih, b_hh) if biased else (w_ih, w_hh)  # unread without biases, but no tensor may be missing
    with _training():
        made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.aten.mkldnn_rnn_layer(
            x, w_ih, w_hh, *biases, h, c, reverse, [], LSTM, size, 1, biased, False, False, True
        )
    return made


@torch.library.custom_op("memopt::lstm_layer_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def lstm_layer_backward(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h: Tensor, c: Tensor, reverse: bool,
    y: Tensor, hy: Tensor, cy: Tensor, workspace: Tensor, dy: Any, dhy: Any, dcy: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, both weights, both biases (made even where there are none), h and c; fp32 as oneDNN's are.

    One of dy, dhy, dcy at least is given. oneDNN keeps its scratch in the workspace; run again, it gives the same.
    """
    biased, size = b_ih is not None, w_hh.shape[1]
    biases = (b_ih, b_hh) if biased else (w_ih, w_hh)
    with _training():
        made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.aten.mkldnn_rnn_layer_backward(
            x, w_ih, w_hh, *biases, h, c, y, hy, cy, dy, dhy, dcy, reverse, LSTM, size, 1, biased, True, False, [],
            False, workspace,
        )  # fmt: skip
    return made


@lstm_layer.register_fake
def _(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h: Tensor, c: Tensor, reverse: bool) -> Any:
    steps, batch, width = x.shape
    hidden = w_hh.shape[1]
    workspace = x.new_empty(workspace_bytes(steps, batch, width, hidden, x.dtype), dtype=torch.uint8)
    return x.new_empty(steps, batch, hidden), h.new_empty(batch, hidden), c.new_empty(batch, hidden), workspace


@lstm_layer_backward.register_fake
def _(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h: Tensor, c: Tensor, reverse: bool, *_: Any) -> Any:
    bias = w_ih.new_empty(w_ih.shape[0], dtype=torch.float32)
    x, w_ih, w_hh, h, c = (x.new_empty(like.shape, dtype=torch.float32) for like in (x, w_ih, w_hh, h, c))
    return x, w_ih, w_hh, bias, torch.empty_like(bias), h, c


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)  # oneDNN's backward takes missing gradients; zeros for them would cost bytes


def _differentiate(ctx: Any, dy: Any, dhy: Any, dcy: Any, _: Any) -> Any:
    *inputs, y, hy, cy, workspace = ctx.saved_tensors
    found = torch.ops.memopt.lstm_layer_backward(*inputs, ctx.reverse, y, hy, cy, workspace, dy, dhy, dcy)
    wanted = zip(found, ctx.needs_input_grad, strict=False)
    return *(gradient if needed else None for gradient, needed in wanted), None


lstm_layer.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def workspace_bytes(steps: int, batch: int, width: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of the workspace of T x B x I -> H; asked of oneDNN at that length, or at two shorter ones.

    Its parts are rows a step and sequence, each part rounded up to a page. After `period` steps more all of them are
    whole pages longer, so from there on the bytes are linear in the steps; which parts there are need not be known.
    """
    size = dtype.itemsize
    rows = PAGE // gcd(hidden * size, width * size, LINE)  # rows that fill whole pages, however wide they are
    period = rows // gcd(batch, rows)
    if steps < 3 * period:
        return _asked(steps, batch, width, hidden, dtype)
    start = period + steps % period
    first, later = (_asked(at, batch, width, hidden, dtype) for at in (start, start + period))
    return first + (steps - start) // period * (later - first)


@functools.cache
def _asked(steps: int, batch: int, width: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of the workspace that oneDNN asks for when it runs on zeros."""
    with _disable_current_modes():
        x, h = torch.zeros(steps, batch, width, dtype=dtype), torch.zeros(batch, hidden, dtype=dtype)
        w_ih, w_hh = (torch.zeros(4 * hidden, n, dtype=dtype) for n in (width, hidden))
        return int(lstm_layer(x, w_ih, w_hh, None, None, h, h.clone(), False)[3].nbytes)
