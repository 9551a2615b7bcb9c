"""Lines a file and a function, against the aims of CONTRIBUTING.md: python tools/sizes.py FOLDER..."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

FILE_LIMIT, FUNCTION_LIMIT = 400, 60


def functions(tree: ast.AST) -> list[tuple[str, int]]:
    """(name, lines) of every function, nested ones too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in ast.walk(tree) if isinstance(n, kinds)]


def main(folders: list[str]) -> int:
    """Print medians and maxima, then whatever is over a limit; the number of those, at most 1, is the exit code."""
    files = {p.resolve(): p for folder in folders for p in sorted(Path(folder).rglob("*.py"))}
    texts = {path: path.read_text(encoding="utf-8") for path in files.values()}
    lines = {str(path): text.count("\n") for path, text in texts.items()}
    sizes = {f"{path}:{name}": size for path, text in texts.items() for name, size in functions(ast.parse(text))}
    for what, found in (("files", lines), ("functions", sizes)):
        ordered = sorted(found.values())
        tenth = ordered[int(0.9 * (len(ordered) - 1))]
        middle, longest = statistics.median(ordered), max(found, key=found.__getitem__)
        print(
            f"{what:10} {len(ordered):5}  median {middle:5.0f}  9 in 10 within {tenth:4}  longest {ordered[-1]:4}",
            longest,
        )
    over = [f"{name} has {size} lines" for found, limit in ((lines, FILE_LIMIT), (sizes, FUNCTION_LIMIT))
            for name, size in found.items() if size > limit]  # fmt: skip
    print("\n".join(over) or "nothing is over the limits")
    return min(len(over), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
