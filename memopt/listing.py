"""A program as readable Python: one operation a line, with shape, bytes and the user's line beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from memopt.facts import facts, is_getitem, op_name
from memopt.program import Program, boundary

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64", "int32": "i32"}
COLUMN = 60  # where the remarks begin, unless the operation is longer


def listing(program: Program) -> str:
    """The program's forward and backward as one Python function over `aten`; it compiles, and is for reading."""
    holders = program.graph.find_nodes(op="placeholder")
    backward = boundary(program)
    lines = [f"def step({', '.join(node.name for node in holders)}):"]
    lines += [_line(f"# {node.name}: {program.names.get(node.name, '')}".rstrip(": "), _made(node)) for node in holders]
    for node in program.graph.nodes:
        if node is backward:
            lines.append("    # backward")
        lines += _statement(node)
    return "\n".join(lines) + "\n"


def _statement(node: fx.Node) -> Iterator[str]:
    if node.op == "call_function" and is_getitem(node):
        yield f"    {node.name} = {_text(node.args[0])}[{node.args[1]}]"
    elif node.op == "call_function":
        words = [*map(_text, node.args), *(f"{name}={_text(value)}" for name, value in node.kwargs.items())]
        yield _line(f"{node.name} = {_callable(op_name(node))}({', '.join(words)})", _made(node), facts(node).source)
    elif node.op == "get_attr":
        yield _line(f"{node.name} = self.{node.target}", _made(node))
    elif node.op == "output":
        yield f"    return {_text(node.args[0])}"


def _callable(name: str) -> str:
    """An expression: what is no dotted name (a lambda, a class's repr) is quoted."""
    return name if all(part.isidentifier() for part in name.split(".")) else f"op[{name!r}]"


def _line(code: str, *remarks: str) -> str:
    said = "  ".join(filter(None, remarks))
    return f"    {code:<{COLUMN}}  # {said}" if said else f"    {code}"


def _made(node: fx.Node) -> str:
    """'f32[4, 8]  128 B': each tensor the node makes; a view has no bytes of its own."""
    made = [one for one in facts(node).made if one is not None]
    kinds = (f"{SHORT.get(one.dtype, one.dtype)}{list(one.shape)}" for one in made)
    return ", ".join(
        f"{kind}  {'view' if one.home is not None else f'{one.nbytes:,} B'}"
        for kind, one in zip(kinds, made, strict=True)
    )


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f"float({str(value)!r})"
    text = str(value)  # torch.float32, device(...): dotted names as they are
    return text if all(part.isidentifier() for part in text.split(".")) else repr(text)
