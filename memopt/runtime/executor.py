"""The eager lowering: a graph as one flat Python function that lets go of each value at its last use.

What it holds after each step is exactly what `memopt.timeline` says. The source is kept (`Executor.source`) so that
MEMOPT_DUMP shows the program that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from memopt.facts import is_getitem, op_name

Probe = Callable[[str, Sequence[Any]], None]


class Executor:
    """A boxed callable over an fx graph: takes a list of inputs, empties it, returns a tuple.

    probe: called after each step with its name and everything still held; for tests and reports, not for training.
    """

    _boxed_call = True

    def __init__(self, module: fx.GraphModule, probe: Probe | None = None) -> None:
        self.constants: dict[str, Any] = {"probe": probe}
        self.taken = {node.name for node in module.graph.nodes}
        self.source = "\n".join(self._lines(module, probe is not None)) + "\n"
        scope = dict(self.constants)
        exec(compile(self.source, "<memopt eager>", "exec"), scope)
        self.run = scope["run"]

    def __call__(self, args: list[Any]) -> Any:
        return self.run(args)

    def _lines(self, module: fx.GraphModule, probed: bool) -> list[str]:
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        dying = _last_uses(module.graph)
        live = [node.name for node in inputs]
        lines = ["def run(args):"]
        if inputs:
            lines += [f"    {', '.join(live)}, = args", "    args.clear()"]
            lines += [f"    probe('', ({', '.join(live)},))"] if probed else []
        for node in module.graph.nodes:
            if node.op == "output":
                return [*lines, f"    return {self._text(tuple(node.args[0]))}"]
            if node.op == "get_attr":
                self.constants[node.name] = _attribute(module, node.target)
            elif node.op == "call_function":
                lines.append(f"    {node.name} = {self._call(node)}")
                live.append(node.name)
            if dead := [name for name in dying.get(node, ()) if name in live]:
                lines.append(f"    del {', '.join(dead)}")
                live = [name for name in live if name not in dead]
            if probed and node.op == "call_function" and not any(is_getitem(user) for user in [node.next]):
                lines.append(f"    probe({_step_name(node)!r}, ({', '.join(live)},))")
        raise AssertionError("an fx graph ends in an output")

    def _call(self, node: fx.Node) -> str:
        if is_getitem(node):
            return f"{self._text(node.args[0])}[{node.args[1]}]"
        words = [self._text(arg) for arg in node.args]
        words += [f"{name}={self._text(arg)}" for name, arg in node.kwargs.items()]
        return f"{self._constant(node.target, op_name(node))}({', '.join(words)})"

    def _text(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return arg.name
        if isinstance(arg, tuple):
            return f"({', '.join(self._text(a) for a in arg)}{',' if len(arg) == 1 else ''})"
        if isinstance(arg, list):
            return f"[{', '.join(self._text(a) for a in arg)}]"
        if isinstance(arg, bool | int | str) or arg is None:
            return repr(arg)
        return self._constant(arg, str(arg))

    def _constant(self, value: Any, text: str) -> str:
        """A name bound to the value, readable: torch.ops.aten.mm.default -> aten_mm_default."""
        name = base = "".join(c if c.isalnum() else "_" for c in text).strip("_") or "value"
        name = base = base if base[0].isalpha() else f"c_{base}"
        count = 0
        while name in self.taken or (name in self.constants and self.constants[name] is not value):
            count += 1
            name = f"{base}_{count}"
        self.constants[name] = value
        return name


def _step_name(node: fx.Node) -> str:
    return node.all_input_nodes[0].name if is_getitem(node) else node.name


def _attribute(module: fx.GraphModule, path: Any) -> Any:
    value: Any = module
    for part in str(path).split("."):
        value = getattr(value, part)
    return value


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[str]]:
    """Node -> names nobody needs once it has run, itself included when nobody reads it."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[str]] = {}
    for node in reversed(graph.nodes):
        for name in (node, *node.all_input_nodes):
            if name not in seen and name.op != "get_attr":
                seen.add(name)
                if node.op != "output":
                    dying.setdefault(node, []).append(name.name)
    return dying
