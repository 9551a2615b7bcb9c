"""Whether inputs fit a forward: which are missing, which it does not take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def misfit(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What is wrong with these inputs, "y and z are missing" or in Python's own words; "" if they fit."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # not written in Python: the call will tell
        return ""
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        return str(error)
    missing = [p.name for p in signature.parameters.values() if _required(p) and p.name not in given]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""


def _required(parameter: inspect.Parameter) -> bool:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in several
