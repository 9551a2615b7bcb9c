"""`nn.LSTM`, `nn.GRU` and `nn.RNN` in a Dynamo graph, so that what is traced computes what untraced torch computes.

torch's decompositions (torch/_decomp/decompositions.py, 2.13) differ from it four times: an LSTM on CPU becomes cells
where torch runs oneDNN's layers, which round differently; a GRU's gates are computed in tensors of their own, which on
CPU round differently from torch's slices of a wider one; the dropout between layers is lost (`_rnn_helper` sets it to
0.0); and an LSTM whose input needs no gradient gets oneDNN's inference layer, whose backward reads a workspace that is
not there and takes the process down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from memopt.runtime.lstm_layer import lstm_layer

# (x (T, B, I), states of the layer, its weights) -> (y (T, B, D * H), the states after it); D directions
Layer = Callable[[Tensor, tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, ...]]


def as_untraced(module: fx.GraphModule, exact: bool) -> None:
    """Have the graph's recurrent networks computed as untraced torch does, in place. exact: to the bit on CPU.

    Packed sequences are left as they are.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in OPERATIONS and _padded(node):
            node.args = (node.target.__name__, exact, *node.args)
            node.target = recurrent
    module.recompile()


def fused_cells(graph: fx.Graph) -> bool:
    """Whether a differentiated graph has cells of an LSTM fused into one operation, as only exact numerics do."""
    return bool(graph.find_nodes(op="call_function", target=torch.ops.memopt.lstm_layer.default))


OPERATIONS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def _padded(node: fx.Node) -> bool:
    """Takes (input, states, params, has_biases, ...); with a packed sequence the batch sizes come second."""
    return len(node.args) == 9 and isinstance(node.args[3], bool)


def recurrent(
    name: str, exact: bool, x: Tensor, states: Any, weights: Sequence[Tensor], biased: bool, layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """What the operation of that name computes with these arguments; run while AOTAutograd traces, on fake tensors."""
    op = getattr(torch, name)
    if exact and op is torch.lstm and by_onednn(x, states, weights):
        layer: Layer = _Directions(_by_onednn, 2 if bidirectional else 1)
    elif exact and op is torch.gru and x.device.type == "cpu":
        layer = _Directions(_gru, 2 if bidirectional else 1)
    elif dropout == 0 or not train or layers == 1:
        with _cells():
            return op(x, states, weights, biased, layers, dropout, train, bidirectional, batch_first)
    else:
        layer = _Cells(op, biased, train, bidirectional)
    return _stacked(layer, x, states, weights, layers, dropout if train else 0.0, batch_first)


def by_onednn(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether untraced torch trains this LSTM with oneDNN: `use_mkldnn`, aten/src/ATen/native/RNN.cpp.

    Without gradients torch runs another primitive: those stay as torch decomposes them.
    """
    tensors = (x, *states, *weights)
    dtypes = {_dtype(x), *(t.dtype for t in tensors)}
    return (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and torch.is_grad_enabled()
        and all(t.device.type == "cpu" for t in tensors)
        and (len(dtypes) == 1 or torch.is_autocast_enabled("cpu"))
        and dtypes <= {torch.float32, torch.bfloat16}
        and (torch.bfloat16 not in dtypes or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and x.numel() != 0
        and states[0].shape[2] == states[1].shape[2]  # no projection
    )


def _dtype(x: Tensor) -> torch.dtype:
    """What this is computed in: autocast casts a layer's inputs, weights and states down."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _stacked(
    layer: Layer, x: Tensor, states: Any, weights: Sequence[Tensor], layers: int, dropout: float, batch_first: bool
) -> tuple[Tensor, ...]:
    """The layers one after the other, with dropout between them. Takes one state (GRU, RNN) or (h, c)."""
    parts = (states,) if isinstance(states, Tensor) else tuple(states)
    directions, share = parts[0].shape[0] // layers, len(weights) // layers
    x = (x.transpose(0, 1) if batch_first else x).contiguous()
    ends = []
    for at in range(layers):
        own = tuple(part[at * directions : (at + 1) * directions] for part in parts)
        x, *end = layer(x, own, weights[at * share : (at + 1) * share])
        ends.append(end)
        if dropout and at < layers - 1:
            x = torch.dropout(x, dropout, train=True)
    last = (torch.cat(end) if layers > 1 else end[0] for end in zip(*ends, strict=True))
    return x.transpose(0, 1) if batch_first else x, *last


class _Directions:
    """A layer computed one direction at a time. Two biases or none follow the two weights of each."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], directions: int) -> None:
        self.run, self.directions = run, directions

    def __call__(self, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        share = len(weights) // self.directions
        made = [
            self.run(x, [s[at] for s in states], weights[at * share : (at + 1) * share], at == 1)
            for at in range(self.directions)
        ]
        y, *ends = zip(*made, strict=True)
        return torch.cat(y, -1) if len(y) > 1 else y[0], *map(torch.stack, ends)


def _by_onednn(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    dtype = _dtype(x)
    w_ih, w_hh, b_ih, b_hh = (*(w.to(dtype) for w in weights), None, None)[:4]
    h, c = (state.contiguous().to(dtype) for state in states)
    y, h, c, _ = lstm_layer(x.to(dtype), w_ih, w_hh, b_ih, b_hh, h, c, reverse)
    return y, h, c


def _gru(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    """The cell of `nn.GRU`'s documentation in the order of aten/src/ATen/native/RNN.cpp.

    Its reset and update gates stay slices of one tensor, so that torch vectorises no more of a row than it does
    untraced: the rest of a row gets the scalar sigmoid, which rounds differently.
    """
    # autocast casts a weight once, not at each step: its gradients are then summed in the lower precision
    w_ih, w_hh, *biases = (w if w.dtype is torch.float64 else w.to(_dtype(w)) for w in weights)
    b_ih, b_hh = biases or (None, None)
    (h,), made = states, []
    inputs = F.linear(x, w_ih, b_ih).unbind(0)
    for step in reversed(inputs) if reverse else inputs:
        gates, new = step.split((2 * h.shape[-1], h.shape[-1]), 1)
        from_state, new_from_state = F.linear(h, w_hh, b_hh).split((2 * h.shape[-1], h.shape[-1]), 1)
        reset, update = (part.sigmoid() for part in (from_state + gates).chunk(2, 1))
        new = (new + new_from_state * reset).tanh()
        h = (h - new) * update + new
        made.append(h)
    return torch.stack(made[::-1] if reverse else made), h


class _Cells:
    """A layer as torch decomposes it."""

    def __init__(self, op: Any, biased: bool, train: bool, bidirectional: bool) -> None:
        self.op, self.biased, self.train, self.bidirectional = op, biased, train, bidirectional

    def __call__(self, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = states if self.op is torch.lstm else states[0]
        with _cells():
            made = self.op(x, given, weights, self.biased, 1, 0.0, self.train, self.bidirectional, False)
        return tuple(made)


@contextmanager
def _cells() -> Iterator[None]:
    """Keeps the decomposition from oneDNN's inference layer where gradients are wanted."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and not torch.is_grad_enabled())
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
