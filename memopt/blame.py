"""Errors of a forward that could not be captured, in one sentence: what failed, at which user line, what to do."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

MINE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
OURS = (TORCH, MINE)
WAY_OUT = "move that line out of the compiled module, or guard it with torch.compiler.disable"


class Twice(Exception):
    """A backward that is to be differentiated reached a captured graph, whose backward has none."""


def sentence(failed: BaseException) -> str:
    """What failed, at which user line, what to do; the original message is in it whole."""
    compiler = isinstance(failed, torch._dynamo.exc.TorchDynamoException)
    if isinstance(failed, torch._dynamo.exc.BackendCompilerFailed):
        failed = failed.inner_exception
    if isinstance(failed, Twice):
        return (
            f"the model's forward differentiates a gradient{user_line(failed)} (create_graph=True), which a captured "
            "graph cannot do; put that gradient and the layers below it in a function under torch.compiler.disable"
        )
    if isinstance(failed, DataDependentOutputException | DynamicOutputShapeException):
        return f"the model's forward depends on the values of its data{user_line(failed)} ({failed}); {WAY_OUT}"
    if original := _original(failed) if compiler else _told(failed):
        return (
            f"the model's forward fails on these inputs{user_line(failed)}: {original}; "
            f"if it does not fail without memopt, {WAY_OUT}"
        )
    return f"the model's forward could not be captured{user_line(failed)}: {_told(failed)}; {WAY_OUT}"


def raised_by_us(failed: BaseException) -> bool:
    """Whether it comes from a line of memopt itself, or from what torch did for that line; not from the user's."""
    outside = [f for f in traceback.extract_tb(failed.__traceback__) if not f.filename.startswith(TORCH)]
    return bool(outside) and outside[-1].filename.startswith(MINE)


def _told(failed: BaseException) -> str:
    """Class and first line of the message."""
    lines = [line.strip() for line in str(failed).splitlines() if line.strip()]
    return ": ".join((type(failed).__name__, *lines[:1]))


def _original(failed: BaseException) -> str:
    """The error inside Dynamo's page about an operation that failed on fake tensors: "RuntimeError: shape ..."."""
    found = re.search(r"""got (\w+)\((['"])(.*)\2,?\)\s*$""", str(failed), re.MULTILINE)
    return f"{found[1]}: {found[3]}" if found else ""


def user_line(failed: BaseException) -> str:
    """ " at file:line in function": the innermost frame that is neither torch's nor ours; "" if there is none."""
    frames: Iterable[traceback.FrameSummary] = getattr(failed, "real_stack", None) or ()
    frames = frames or traceback.extract_tb(failed.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith((*OURS, "<"))]
    if not theirs:
        return ""
    name = re.sub(r"torch_dynamo_resume_in_(\w+?)_at_\d+", r"\1", theirs[-1].name)
    return f" at {theirs[-1].filename}:{theirs[-1].lineno} in {name}"
