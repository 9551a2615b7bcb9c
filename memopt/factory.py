"""The user's own model: "file.py:factory", where factory() returns (model, inputs) or (model, inputs, loss_fn)."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.calls import misfit
from memopt.errors import Killed
from memopt.workload import Workload, loss_of

if TYPE_CHECKING:
    from torch import Tensor, nn

WANTED = "(model, inputs) or (model, inputs, loss_fn), inputs a tuple or a dict of tensors"


def load_factory(path: str, name: str) -> Workload:
    """The workload of that function, which is called anew for the model and for the inputs, and fixes their sizes.

    ValueError in one sentence if the file, the function or what it returns is not usable; what the user's code
    raises is its cause.
    """
    factory = _find(Path(path), name)
    where = f"{path}:{name}"

    # The loss function may belong to the instance it came with. Building another in the forward would be traced.
    kept: list[Callable[[Any], Tensor]] = []

    def build() -> nn.Module:
        model, _, loss = _made(factory, where)
        kept[:] = [loss]
        return model.train()

    def inputs(batch: int, seq: int) -> dict[str, Tensor]:
        if batch or seq:
            raise ValueError(f"{where} fixes its own inputs, so batch and sequence cannot be asked for")
        return _made(factory, where)[1]

    def loss(output: Any) -> Tensor:
        if not kept:
            kept.append(_made(factory, where)[2])
        return loss_of(kept[0](output))

    return Workload(where, build, inputs, loss, 0, 0, where)


def _find(path: Path, name: str) -> Callable[[], Any]:
    """The function, from a module of its own; the file's folder joins the end of sys.path for what it imports."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"memopt_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as Python")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.extend([] if folder in sys.path else [folder])
    try:
        spec.loader.exec_module(module)
    except Killed:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not load: {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    return factory  # type: ignore[no-any-return]


def _made(factory: Callable[[], Any], where: str) -> tuple[nn.Module, dict[str, Tensor], Callable[[Any], Tensor]]:
    from torch import nn

    from memopt.fakes import convertible

    try:
        with convertible():
            made = factory()
    except Killed:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ValueError(f"{where} returned a {type(made).__name__}; it has to return {WANTED}")
    loss = made[2] if len(made) == 3 else loss_of
    if not callable(loss):
        raise ValueError(f"{where} returned a loss_fn that cannot be called, a {type(loss).__name__}")
    return made[0], _named(made[0], made[1], where), loss


def _named(model: nn.Module, inputs: object, where: str) -> dict[str, Tensor]:
    """Inputs by the names of the model's parameters."""
    if isinstance(inputs, Mapping):
        if not model._forward_pre_hooks:  # which may add what is missing
            _fitting(model, (), inputs, where)
        return dict(inputs)
    if not isinstance(inputs, (tuple, list)):
        raise ValueError(f"{where} returned inputs that are a {type(inputs).__name__}; it has to return {WANTED}")
    signature = inspect.signature(model.forward)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds or inspect.Parameter.POSITIONAL_ONLY in kinds:
        raise ValueError(f"{where}: the model takes unnamed inputs; give its forward names and return a dict")
    _fitting(model, inputs, {}, where)
    return dict(signature.bind(*inputs).arguments)


def _fitting(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> None:
    if wrong := misfit(model.forward, args, kwargs):
        raise ValueError(f"{where}: the inputs do not fit the model's forward: {wrong}")
