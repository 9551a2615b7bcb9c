"""What holds in every test: edited, inserted and passed graphs are verified, Dynamo starts afresh, one thread.

The pipeline itself verifies where it must; here each call of `edit` and `insert` and each cleanup is, in tests too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import hypothesis
import pytest
import torch

from memopt import pipeline, planning
from memopt.edit import edit
from memopt.errors import VerifyError
from memopt.graph import StepGraph, verify
from memopt.insertion import insert
from memopt.photograph import photograph
from memopt.program import Program
from memopt.refusal import Refused
from memopt.runtime.trace import make_way

# No deadline: a shared machine says nothing about speed. Derandomised: the same run twice tells the same.
hypothesis.settings.register_profile("memopt", derandomize=True, deadline=None)
hypothesis.settings.load_profile("memopt")


def pytest_sessionstart() -> None:
    torch.set_num_threads(1)  # sums depend on it, and two workers share two cores
    # torch writes its trace where that logger has a handler. pytest gives each that does not propagate one of its own,
    # and every capture took a fifth longer for a trace that nobody reads.
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True, scope="session")
def verification() -> Iterator[None]:
    """Whatever `edit`, `insert` and the cleanups return is verified, whoever called them by whatever import."""
    with pytest.MonkeyPatch.context() as patch:
        _everywhere(patch, edit, _checked(edit, verify))
        _everywhere(patch, insert, _checked(insert, _verify_program))
        _everywhere(patch, pipeline.prepare, _same_interface(pipeline.prepare))
        patch.setattr(pipeline, "passed", _after_pass(pipeline.passed))
        yield


@pytest.fixture(autouse=True)
def rewritten_whatever_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites stay, however their times turn out on this machine; tests of that choice set it themselves."""
    monkeypatch.setattr(planning, "WORTH", 0.0)


@pytest.fixture
def unadvised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals without ways out, where a test wants the floor alone: each of them is a plan of its own."""
    monkeypatch.setattr(Refused, "ways_out", lambda self: ())


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compiled code and recompile counts of one test are not the next one's, nor is a guard's recording."""
    yield
    make_way()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _everywhere(patch: pytest.MonkeyPatch, old: Any, new: Any) -> None:
    """Replace a function in every loaded module of ours; what is loaded later imports the new one."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("memopt", "tests"):
            for attribute in [key for key, value in vars(module).items() if value is old]:
                patch.setattr(module, attribute, new)


def _checked(function: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        check(result)
        return result

    return call


def _verify_program(changed: Program) -> StepGraph:
    changed.graph.lint()
    return verify(photograph(changed))


def _after_pass(passed: Callable[..., None]) -> Callable[..., None]:
    @wraps(passed)
    def call(place: int, name: str, before: Any, changed: Program, *rest: Any) -> None:
        try:
            _verify_program(changed)
        except (VerifyError, RuntimeError) as error:  # RuntimeError: fx's own lint
            raise VerifyError(f"the pass {name!r} broke the program: {error}") from error
        passed(place, name, before, changed, *rest)

    return call


def _same_interface(
    prepare: Callable[..., Callable[[Program], Program]],
) -> Callable[..., Callable[[Program], Program]]:
    @wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Callable[[Program], Program]:
        run = prepare(*args, **kwargs)

        def checked(given: Program) -> Program:
            made = run(given)
            if _interface(made) != _interface(given):
                raise VerifyError("the passes changed the program's inputs or outputs")
            return made

        return checked

    return call


def _interface(program: Program) -> list[Any]:
    """Names of the inputs; shape and dtype of each output, None where there is no tensor."""
    values = [node.meta["val"] if node else None for part in program.outputs for node in part]
    holders = [node.name for node in program.graph.find_nodes(op="placeholder")]
    return [holders, [(v.shape, v.dtype) if isinstance(v, torch.Tensor) else None for v in values]]
