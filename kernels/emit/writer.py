"""The body of a kernel: each result is asked for at the index its memory is counted with, and asks for what it is made
of in turn. A value is written once for each index and condition it is wanted at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from memopt.kernels.emit import masks as conditions
from memopt.kernels.emit import words
from memopt.kernels.emit.indices import Index, Unreadable, counting, flattened, total, unravelled
from memopt.kernels.emit.layout import layout_of, over_rows
from memopt.kernels.emit.masks import Masks, within
from memopt.kernels.emit.nodes import REDUCTIONS, argument, dimension, kind_of, name_of, reduced, shape_of, value_of
from memopt.kernels.emit.packed import PACK_BITS, UNPACKED, unpacked
from memopt.kernels.emit.views import VIEWS, Place, first_of, spread
from memopt.kernels.emit.words import Value, constant, kind, spelled

EIGHT = 8
AT, ROW, COL = "at", "row", "col"  # what kernels count with: elements; rows and columns
TAKEN = frozenset({AT, ROW, COL, "tl", "program", "tile", "triton", "kernel", "sum", "abs", "pow", "range", "float",
                   *words.HELPERS})  # fmt: skip


class Writer:
    """Writes the lines of one kernel. lines: so far; totals: (result, what each tile adds to it) of sums over rows;
    helpers: functions that the lines call; loads: bytes of each tensor that is read, by how it is read."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        holders = module.graph.find_nodes(op="placeholder")
        self.pointer = {node: (f"x{at}", x) for at, (node, x) in enumerate(zip(holders, inputs, strict=True))}
        self.layout = layout_of(module.graph, outputs)
        self.lines: list[str] = []
        self.totals: list[tuple[str, str]] = []
        self.helpers: set[str] = set()
        self.loads: dict[tuple[str, str, str], int] = {}
        self.known: dict[tuple[fx.Node, Place, Masks], Value] = {}
        self.names: dict[str, Value] = {}

    # what is counted

    @property
    def rows(self) -> Index:
        return counting(ROW if self.layout.columns else AT, self.layout.rows)

    @property
    def columns(self) -> Index:
        return counting(COL, self.layout.columns)

    @property
    def place(self) -> Index:
        """Of an element among all."""
        return total([(self.layout.columns, self.rows), (1, self.columns)]) if self.layout.columns else self.rows

    def enumerated(self, like: Tensor) -> Place:
        """The index of the element of a dense tensor that is counted: in the order of its memory, or, where that runs
        across the rows, in that of its dimensions."""
        counted = {self.layout.rows * max(self.layout.columns, 1): self.place, self.layout.rows: self.rows}
        if like.numel() not in counted:
            raise Unreadable("results of several sizes")
        order, shape = memory_order(like)
        try:
            found = unravelled(counted[like.numel()], shape)
        except Unreadable:
            return unravelled(counted[like.numel()], like.shape)
        places = dict(zip(order, found, strict=True))
        return tuple(places[dim] for dim in range(like.dim()))

    # results

    def store(self, at: int, node: Any, like: Tensor) -> bool:
        """Write a result; whether it is a sum over all rows, of which each program writes its own."""
        if not isinstance(node, fx.Node):
            raise Unreadable("a result that is no tensor")
        if name_of(node) == PACK_BITS:
            self.pack_bits(at, node)
            return False
        if self.layout.columns and (summed := over_rows(node, self.layout)) is not None:
            self.add_up(f"y{at}", summed)
            return True
        value = self.value(node, self.enumerated(like), ()).cast(kind(like.dtype))
        where = self.address(like)
        stored = value.text if value.number is not None else f"{value.text}.to(tl.{words.STORED[like.dtype]})"
        single = f" + {ROW if self.layout.columns else AT} * 0" if self.layout.rows == 1 else ""  # else no block
        self.lines.append(f"tl.store(y{at}_ptr + {where.text()}{single}, {stored}{self.mask(where, ())})")
        return False

    def pack_bits(self, at: int, node: fx.Node) -> None:
        """Write masks, eight to a byte: what a program's elements are is eight times as many bytes'."""
        x: Any = node.args[0]
        like = torch.empty_strided(shape_of(x), argument(node, 1), device="meta")
        count = self.layout.rows
        if self.layout.columns or count != like.numel() or count < EIGHT:
            raise Unreadable("masks that are packed among rows")
        value = self.value(x, self.enumerated(like), ()).cast("int32")
        text = value.text if AT in value.axes else f"tl.broadcast_to({value.text}, [BLOCK])"
        text = f"tl.where({AT} < {count}, {text}, 0)" if count % self.layout.block else text
        bits = f"tl.reshape({text}, [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]"
        self.lines.append(f"bits_{at} = tl.sum({bits}, 1).to(tl.uint8)")
        self.lines.append(f"byte_{at} = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)")
        self.lines.append(f"tl.store(y{at}_ptr + byte_{at}, bits_{at}, mask=byte_{at} < {-(-count // 8)})")

    def pointer_of(self, node: Any) -> str:
        """The name of what is read whole. Raises Unreadable for what the region makes itself."""
        if node not in self.pointer:
            raise Unreadable("bytes that the region makes itself")
        return self.pointer[node][0]

    def address(self, like: Tensor) -> Index:
        """Of the element of a result."""
        return flattened(self.enumerated(like), like.stride())

    def add_up(self, name: str, node: fx.Node) -> None:
        """What a tile of rows adds to a sum over all of them."""
        x: Any = node.args[0]
        if kind_of(node) != "float32":
            raise Unreadable("a sum of integers over all rows")
        shape, outer = shape_of(x), len(reduced(node))
        index = unravelled(self.rows, shape[:outer]) + unravelled(self.columns, shape[outer:])
        value = self.value(x, index, ()).cast("float32")
        text = value.text if value.axes >= {ROW} else f"tl.broadcast_to({value.text}, [ROWS, BLOCK])"
        text = f"tl.where({ROW} < {self.layout.rows}, {text}, 0.0)" if self.layout.ragged else text
        self.totals.append((name, f"tl.sum({text}, 0)[None, :]"))

    # values

    def value(self, node: Any, index: Place, masks: Masks) -> Value:
        """The code of an element."""
        if not isinstance(node, fx.Node):
            raise Unreadable("a value that is no tensor")
        key = node, index, masks
        if key not in self.known:
            self.known[key] = self.made(node, index, masks)
        return self.known[key]

    def made(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        if node.op == "placeholder":
            return self.loaded(*self.pointer[node], index, masks)
        if node.op != "call_function":
            raise Unreadable(f"a {node.op}")
        name = name_of(node)
        if name in VIEWS:
            return self.value(*VIEWS[name](node, index), masks)
        return SPECIAL.get(name, Writer.computed)(self, node, index, masks)

    def loaded(self, name: str, x: Tensor, index: Place, masks: Masks) -> Value:
        where = flattened(index, x.stride())
        mask = self.mask(where, masks)
        load = f"tl.load({name}_ptr + {where.text()}{mask}{', other=0' if mask else ''})"
        places = prod(digit.size for _, digit in where.terms)
        self.loads[name, where.text(), mask] = min(places, x.numel()) * x.element_size()
        to = kind(x.dtype)
        text = f"({load} != 0)" if to == "int1" else f"{load}.to(tl.{to})"
        return self.named(name, Value(text, to, frozenset(where.variables())))

    def computed(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        """A pointwise operation."""
        name = name_of(node)
        if name not in words.SPELLED:
            raise Unreadable(f"the operation {name}")
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise Unreadable(f"a {name} with options")
        given = [arg for arg in node.args if arg is not None]
        words.check(name, value_of(node), [value_of(arg) if isinstance(arg, fx.Node) else arg for arg in given])
        values = [self.argument(arg, index, masks) for arg in given]
        if all(value.number is not None for value in values) and values:
            first, size = values[0], "[1, 1]" if self.layout.columns else "[1]"
            values[0] = self.named("number", Value(f"tl.full({size}, {first.text}, tl.{first.kind})", first.kind))
        self.helpers.update({name} & set(words.HELPERS))
        spelling = "clamp_most" if name == "clamp" and node.args[1] is None else name
        return self.joined(name, spelled(spelling, values, kind_of(node), self.common(name, given)), node, values)

    def common(self, name: str, given: Sequence[Any]) -> str:
        """The type in which values are compared."""
        if name not in words.COMPARISON:
            return ""
        first, second = (value_of(arg) if isinstance(arg, fx.Node) else arg for arg in given)
        return kind(torch.result_type(first, second))

    def joined(self, name: str, text: str, node: fx.Node, values: Sequence[Value]) -> Value:
        """A variable of what is made of these values."""
        return self.named(name, Value(text, kind_of(node), frozenset().union(*(value.axes for value in values))))

    def argument(self, arg: Any, index: Place, masks: Masks) -> Value:
        """An argument's element where the result's is."""
        if isinstance(arg, fx.Node):
            return self.value(arg, spread(index, shape_of(arg)), masks)
        if isinstance(arg, bool | int | float):
            return constant(arg, "int1" if isinstance(arg, bool) else "int64" if isinstance(arg, int) else "float32")
        raise Unreadable(f"an argument {arg!r}")

    def named(self, base: str, value: Value) -> Value:
        """A variable of this value; the one that has it already."""
        if value.text in self.names:
            return self.names[value.text]
        taken, name, count = {known.text for known in self.names.values()} | TAKEN, base.strip("_"), 0
        stem = name
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        self.lines.append(f"{name} = {value.text}")
        self.names[value.text] = Value(name, value.kind, value.axes)
        return self.names[value.text]

    def mask(self, where: Index, masks: Masks) -> str:
        """The argument that keeps a program within what there is. Conditions along what the address does not differ
        along keep it from nothing."""
        counted, layout = where.variables(), self.layout
        own = [f"{AT} < {layout.rows}"] if AT in counted and layout.rows % layout.block else []
        own += [f"{ROW} < {layout.rows}"] if ROW in counted and layout.ragged else []
        own += [f"{COL} < {layout.columns}"] if COL in counted and layout.padded else []
        shared = [(text, along) for text, along in masks if along & counted]
        if any(not along <= counted for _, along in shared):
            raise Unreadable("a condition along more than what is read")
        found = [*own, *(text for text, _ in shared)]
        return f", mask={conditions.every(found)}" if found else ""

    # what is neither pointwise nor a view

    def reduced(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        """A sum, or the largest or least, of whole rows."""
        x, shape, dims = node.args[0], shape_of(node.args[0]), reduced(node)
        if not dims:  # of a number
            return self.value(x, index, masks).cast(kind_of(node))
        outer = len(shape) - len(dims)
        if dims != tuple(range(outer, len(shape))) or prod(shape[outer:]) != self.layout.columns:
            raise Unreadable("a reduction of what is no row")
        if name_of(node) != "sum" and kind_of(node) != "float32":
            raise Unreadable("the largest of integers")
        kept = index[:outer]
        if any({COL, AT} & i.variables() for i in kept) or any(COL in along for _, along in masks):
            raise Unreadable("a reduction for each column")
        value = self.value(x, (*kept, *unravelled(self.columns, shape[outer:])), masks).cast(kind_of(node))
        word, none = REDUCTIONS[name_of(node)]
        text = value.text if COL in value.axes else f"tl.broadcast_to({value.text}, [ROWS, BLOCK])"
        text = f"tl.where({COL} < {self.layout.columns}, {text}, {none})" if self.layout.padded else text
        found = f"tl.{word}({text}, 1, keep_dims=True)"
        if word != "sum":  # of which Triton's pass over what is not a number
            wrong = f"tl.sum(({text} != {text}).to(tl.int32), 1, keep_dims=True) > 0"
            found = f'tl.where({wrong}, float("nan"), {found})'
        return self.named(name_of(node), Value(found, kind_of(node), frozenset({ROW})))

    def cast(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        value, to = self.value(node.args[0], index, masks), kind_of(node)
        source, target = value_of(node.args[0]).dtype, value_of(node).dtype
        if target in words.NARROW and source not in (target, torch.bool):
            raise Unreadable("a cast to integers that wrap around")
        return value if value.kind == to else self.named("cast", value.cast(to))

    def filled(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        number = argument(node, 0 if name_of(node) == "scalar_tensor" else 1)
        if not isinstance(number, bool | int | float):
            raise Unreadable("a fill that is no number")
        return constant(number, kind_of(node))

    def count(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        """arange.start_step(first, end, step)."""
        first, step = argument(node, 0), argument(node, 2, 1)
        if name_of(node) != "arange" or not (isinstance(first, int) and isinstance(step, int)) or len(node.args) < 2:
            raise Unreadable("a range of another kind")
        found = total([(step, index[0])]).shifted(first)
        if max(abs(found.most), abs(first)) >= 2**31:
            raise Unreadable("a range of 64 bits")
        if not found.terms:
            return constant(found.constant, kind_of(node))
        counted = self.named("count", Value(f"({found.text()})", "int32", frozenset(found.variables())))
        return counted.cast(kind_of(node))

    def chosen(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        which, *values = (self.argument(arg, index, masks) for arg in node.args)
        first, second = (value.cast(kind_of(node)) for value in values)
        text = f"tl.where({which.cast('int1').text}, {first.text}, {second.text})"
        return self.joined("chosen", text, node, (which, first, second))

    def concatenated(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        """Each part where it lies; its own is read nowhere else."""
        parts, dim, first = argument(node, 0), dimension(node, 1, len(index)), 0
        if len({len(shape_of(part)) for part in parts}) > 1:
            raise Unreadable("a concatenation with nothing")
        found: list[tuple[int, Value]] = []
        for at, part in enumerate(parts):
            end = first + shape_of(part)[dim]
            inside = within(index[dim], first, None if at == len(parts) - 1 else end)
            value = self.value(part, moved(index, dim, -first), (*masks, *inside))
            found.append((end, value.cast(kind_of(node))))
            first = end
        place, value = index[dim], found[-1][1]
        for end, other in reversed(found[:-1]):
            text = f"tl.where({place.text()} < {end}, {other.text}, {value.text})"
            axes = other.axes | value.axes | place.variables()
            value = self.named("joined", Value(text, value.kind, axes))
        return value

    def placed(self, node: fx.Node, index: Place, masks: Masks) -> Value:
        """slice_scatter(base, part, dim, first, end): the part within the base."""
        base, part, size = argument(node, 0), argument(node, 1), shape_of(node)
        if argument(node, 5, 1) != 1:
            raise Unreadable("a scatter with gaps")
        dim = dimension(node, 2, len(size))
        first = first_of(argument(node, 3, 0), size[dim])
        end = first + shape_of(part)[dim]
        inside = within(index[dim], first, end if end < size[dim] else None)
        if not inside:
            return self.value(part, index, masks)
        value = self.value(part, moved(index, dim, -first), (*masks, *inside)).cast(kind_of(node))
        under = self.value(base, index, masks).cast(kind_of(node))
        where = conditions.every([text for text, _ in inside])
        axes = value.axes | under.axes | index[dim].variables()
        return self.named("placed", Value(f"tl.where({where}, {value.text}, {under.text})", value.kind, axes))


def memory_order(like: Tensor) -> tuple[list[int], list[int]]:
    """(dimensions in the order in which a dense tensor's memory counts them, their sizes). Raises Unreadable for one
    with gaps."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda dim: (-strides[dim], dim))
    shape = [like.shape[dim] for dim in order]
    steps = [(strides[dim], prod(shape[at + 1 :])) for at, dim in enumerate(order) if like.shape[dim] > 1]
    if any(step != dense for step, dense in steps):
        raise Unreadable("a result with gaps in memory")
    return order, shape


def moved(index: Place, dim: int, by: int) -> Place:
    """The index with one dimension's shifted."""
    return (*index[:dim], index[dim].shifted(by), *index[dim + 1 :])


SPECIAL: dict[str, Callable[[Writer, fx.Node, Place, Masks], Value]] = {
    **dict.fromkeys(("_to_copy", "convert_element_type"), Writer.cast),
    **dict.fromkeys(("full", "scalar_tensor", "full_like"), Writer.filled),
    **dict.fromkeys(("arange", "iota"), Writer.count),
    **dict.fromkeys(REDUCTIONS, Writer.reduced),
    "where": Writer.chosen,
    "cat": Writer.concatenated,
    "slice_scatter": Writer.placed,
    **dict.fromkeys(UNPACKED, unpacked),
}
