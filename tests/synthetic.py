"""Synthetic step graphs for tests and experiments: models as the photograph sees them, without torch.

`Tape` records forward operations and writes the backward and the optimizer phase from what each operation saves, so
that a graph has the shape of a real step: long-lived boundaries, views, shared tables, several outputs of one step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from memopt.edit import live_steps
from memopt.graph import Phase, Step, StepGraph, Storage, TensorInfo, verify

BANDWIDTH = 2e11  # bytes a second of the imagined device; only ratios between steps matter here
RATE = 2e13  # floating-point operations a second of the same device


@dataclass
class Op:
    """One recorded operation: what its backward reads (turned: through views it takes), what wants a gradient."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saves: tuple[str, ...]
    flops: int
    view: bool = False
    turned: bool = False


@dataclass
class Tape:
    """Builds a StepGraph operation by operation. `seconds` fills with a roofline of bytes and flops."""

    inputs: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    grads: dict[str, str] = field(default_factory=dict)

    def given(self, name: str, nbytes: int, kind: str = "parameter") -> str:
        self.declare(name, nbytes, kind)
        self.inputs.append(name)
        return name

    def declare(self, name: str, nbytes: int, kind: str = "activation", of: str | None = None) -> None:
        storage = self.tensors[of].storage if of else name
        if of is None:
            self.storages[name] = Storage(name, nbytes, kind)
        self.tensors[name] = TensorInfo(name, (nbytes // 2,), "bfloat16", storage)

    def nbytes(self, name: str) -> int:
        return self.storages[self.tensors[name].storage].nbytes

    def step(self, name: str, reads: tuple[str, ...], writes: tuple[str, ...], phase: Phase = "forward", *,
             flops: int = 0, workspace: int = 0, pure: bool = True, free: bool = False) -> None:  # fmt: skip
        key = name.split(".")[-1] + "|" + ",".join(str(self.nbytes(n)) for n in (*reads, *writes))
        self.steps.append(Step(name, name.split(".")[-1], phase, reads, writes, "", key, flops, workspace, pure))
        moved = sum(self.nbytes(n) for n in (*reads, *writes))
        self.seconds[name] = 0.0 if free else max(flops / RATE, moved / BANDWIDTH) + 2e-6

    def op(self, name: str, inputs: tuple[str, ...], sizes: tuple[int, ...], saves: str = "inputs", *,
           flops: int = 0, workspace: int = 0, pure: bool = True, turned: bool = False) -> tuple[str, ...]:  # fmt: skip
        """saves: 'inputs', 'outputs', 'both' or 'none'; the backward step reads those and the gradient.

        turned: it reads them through views it takes, as that of a product (flops) always does."""
        outs = tuple(name if i == 0 else f"{name}.{i}" for i in range(len(sizes)))
        for out, size in zip(outs, sizes, strict=True):
            self.declare(out, size)
        self.step(name, inputs, outs, flops=flops, workspace=workspace, pure=pure)
        kept = {"inputs": inputs, "outputs": outs, "both": (*inputs, *outs), "none": ()}[saves]
        self.ops.append(Op(name, inputs, outs, kept, flops, turned=turned or flops > 0))
        return outs

    def view(self, name: str, of: str) -> str:
        self.declare(name, self.nbytes(of), of=of)
        self.step(name, (of,), (name,), free=True)
        self.ops.append(Op(name, (of,), (name,), (), 0, view=True))
        return name

    def backward(self, loss: str) -> None:
        self.declare("grad." + loss, self.nbytes(loss), "temporary")
        self.step("seed." + loss, (loss,), ("grad." + loss,), "backward")
        self.grads[loss] = "grad." + loss
        for op in reversed(self.ops):
            grads = tuple(self.grads[o] for o in op.outputs if o in self.grads)
            if grads:
                self.differentiate(op, grads)

    def differentiate(self, op: Op, grads: tuple[str, ...]) -> None:
        wanted = [n for n in dict.fromkeys(op.inputs) if self.storages[self.tensors[n].storage].kind in WANTED]
        if op.view:
            self.declare(f"{op.name}.back", self.nbytes(op.inputs[0]), of=grads[0])
            self.step(f"{op.name}.back", grads, (f"{op.name}.back",), "backward", free=True)
            self.accumulate(op.inputs[0], f"{op.name}.back")
            return
        for i, name in enumerate(wanted):
            kind = "gradient" if name in self.inputs else "temporary"
            out = f"{op.name}.d{i}"
            self.declare(out, self.nbytes(name), kind)
            saved = tuple(s for s in op.saves if s != name) if op.flops else op.saves
            if op.turned:
                saved = tuple(self.turn(f"{out}.t{j}", of) for j, of in enumerate(saved))
            self.step(out, (*grads, *saved), (out,), "backward", flops=op.flops)
            self.accumulate(name, out)

    def turn(self, name: str, of: str) -> str:
        """A view the backward takes of a saved value, as the gradient of a weight does of the product's input."""
        self.declare(name, self.nbytes(of), of=of)
        self.step(name, (of,), (name,), "backward", free=True)
        return name

    def accumulate(self, name: str, grad: str) -> None:
        if name in self.grads:
            total = f"{grad}.sum"
            self.declare(total, self.nbytes(name), self.storages[self.tensors[grad].storage].kind)
            self.step(total, (self.grads[name], grad), (total,), "backward")
            grad = total
        self.grads[name] = grad

    def graph(self, outputs: tuple[str, ...]) -> StepGraph:
        held = tuple(g for n, g in self.grads.items() if n in self.inputs)
        graph = StepGraph(
            tuple(self.inputs),
            live_steps(self.steps, (*outputs, *held)),
            (*outputs, *held),
            dict(self.tensors),
            dict(self.storages),
        )
        return verify(graph)


WANTED = ("parameter", "activation")


def linear(t: Tape, name: str, x: str, out: int, inner: int) -> str:
    """y = x w: rows of `out` bytes from a weight of inner * out features (both in bytes of bf16)."""
    w = t.given(f"{name}.w", max(2, inner))
    return t.op(f"{name}.mm", (x, w), (out,), flops=max(1, inner * out // 8))[0]


def llama(layers: int, *, tokens: int = 2048, width: int = 512, vocab: int = 8000,
          extra: int = 0) -> tuple[StepGraph, dict[str, float]]:  # fmt: skip
    """A llama-like step: shared rotary tables and mask, two residual adds a layer; `extra` adds copies per matmul."""
    t = Tape()
    row = tokens * width * 2
    ids = t.given("ids", tokens * 8, "input")
    table = t.given("embed.w", vocab * width * 2)
    x = t.op("embed", (ids, table), (row,))[0]
    (freq,) = t.op("rotary.freq", (ids,), (tokens * 128,), "none")
    (cos,) = t.op("rotary.cos", (freq,), (tokens * 128,), "none")
    (sin,) = t.op("rotary.sin", (freq,), (tokens * 128,), "none")
    for i in range(layers):
        x = llama_layer(t, f"l{i}", x, cos, sin, row, width, extra)
    (x, _) = t.op("norm", (x,), (row, tokens * 4), "both")
    w = t.given("head.w", vocab * width * 2)
    flops = 2 * tokens * width * vocab
    (logits,) = t.op("head.mm", (x, w), (tokens * vocab * 2,), flops=flops)
    (soft,) = t.op("logsoftmax", (logits,), (tokens * vocab * 4,), "outputs")
    (loss,) = t.op("nll", (soft, ids), (4,), "inputs")
    t.backward(loss)
    return t.graph((loss,)), t.seconds


def llama_layer(t: Tape, n: str, x: str, cos: str, sin: str, row: int, width: int, extra: int) -> str:
    """Attention and gated MLP, as ATen spells them roughly: norms save a row statistic, views cost nothing."""
    square, rows = width * width * 2, row // (2 * width)

    def mm(name: str, a: str, factor: float = 1.0, back: float = 1.0) -> str:
        w = t.given(f"{n}.{name}.w", int(square * factor * back))
        made = t.op(f"{n}.{name}", (t.view(f"{n}.{name}.v", a), w), (int(row * factor),),
                    flops=int(2 * rows * width * width * factor * back))[0]  # fmt: skip
        for i in range(extra):
            made = t.view(f"{n}.{name}.v{i}", made)
        return made

    (h, _) = t.op(f"{n}.norm1", (x,), (row, rows * 4), "both")
    q, k, v = mm("q", h), mm("k", h, 0.25), mm("v", h, 0.25)
    qr = t.op(f"{n}.ropeq", (q, cos, sin), (row,), "none")[0]
    kr = t.op(f"{n}.ropek", (k, cos, sin), (row // 4,), "none")[0]
    t.ops[-1].saves = t.ops[-2].saves = (cos, sin)
    (a, _) = t.op(f"{n}.sdpa", (qr, kr, v), (row, rows * 32), "both", flops=4 * rows * rows * width)
    x = t.op(f"{n}.add1", (x, mm("o", a)), (row,), "none")[0]
    (h, _) = t.op(f"{n}.norm2", (x,), (row, rows * 4), "both")
    g, u = mm("gate", h, 3.5), mm("up", h, 3.5)
    s = t.op(f"{n}.silu", (g,), (int(row * 3.5),))[0]
    m = t.op(f"{n}.mul", (s, u), (int(row * 3.5),))[0]
    w = t.given(f"{n}.down.w", int(square * 3.5))
    d = t.op(f"{n}.down", (m, w), (row,), flops=int(2 * rows * width * width * 3.5))[0]
    return t.op(f"{n}.add2", (x, d), (row,), "none")[0]


def mlp(layers: int, *, size: int = 1 << 20) -> tuple[StepGraph, dict[str, float]]:
    """A plain residual chain whose weights are small: boundaries are all there is to save on."""
    t = Tape()
    x = t.given("x", size, "input")
    for i in range(layers):
        h = t.op(f"a{i}", (x, t.given(f"w{i}", 64)), (size,), flops=size * 100)[0]
        h = t.op(f"g{i}", (h,), (size,))[0]
        x = t.op(f"r{i}", (x, h), (size,), "none")[0]
    (loss,) = t.op("loss", (x,), (4,))
    t.backward(loss)
    return t.graph((loss,)), t.seconds


def unet(depth: int = 4, *, image: int = 1 << 22) -> tuple[StepGraph, dict[str, float]]:
    """Encoder and decoder of conv-norm-relu pairs; a skip from each level is read again on the way up."""
    t = Tape()
    x = t.given("image", image, "input")
    skips = []
    size = image * 4
    for i in range(depth):
        x = conv(t, f"e{i}.a", x, size)
        x = conv(t, f"e{i}.b", x, size)
        skips.append((x, size))
        x = t.op(f"e{i}.pool", (x,), (size // 4,), "both")[0]
        size //= 2
    x = conv(t, "mid", x, size)
    for i, (skip, size) in reversed(list(enumerate(skips))):
        up = t.op(f"d{i}.up", (x,), (size,), "none")[0]
        cat = t.op(f"d{i}.cat", (up, skip), (2 * size,), "none")[0]
        x = conv(t, f"d{i}.b", conv(t, f"d{i}.a", cat, size), size)
    (loss,) = t.op("loss", (x,), (4,))
    t.backward(loss)
    return t.graph((loss,)), t.seconds


def conv(t: Tape, n: str, x: str, size: int) -> str:
    w = t.given(f"{n}.w", 1 << 14)
    (y,) = t.op(f"{n}.conv", (x, w), (size,), flops=size * 300, workspace=size // 8)
    (z, _) = t.op(f"{n}.norm", (y,), (size, 1024), "both")
    return t.op(f"{n}.relu", (z,), (size,), "outputs")[0]


def random_step(seed: int, steps: int = 7) -> tuple[StepGraph, dict[str, float]]:
    """A small random DAG with its backward: uneven bytes and seconds, views, shared reads, impure steps."""
    rng = random.Random(seed)
    t = Tape()
    made = [t.given("x", rng.randint(1, 40), "input"), t.given("w", rng.randint(1, 40))]
    last = "x"
    for i in range(steps):
        reads = tuple(dict.fromkeys([last, *rng.sample(made, rng.randint(0, min(2, len(made))))]))
        if rng.random() < 0.15 and last not in t.inputs:
            last = t.view(f"n{i}", last)
        else:
            sizes = tuple(rng.randint(1, 100) for _ in range(rng.choice((1, 1, 1, 2))))
            saves = rng.choice(("inputs", "outputs", "both", "none"))
            last = t.op(
                f"n{i}",
                reads,
                sizes,
                saves,
                pure=rng.random() > 0.1,
                workspace=rng.randint(0, 30),
                turned=rng.random() < 0.5,
            )[0]
            t.seconds[f"n{i}"] = float(rng.randint(1, 20))
        made.append(last)
    (loss,) = t.op("loss", (last,), (4,))
    t.backward(loss)
    return t.graph((loss,)), t.seconds
