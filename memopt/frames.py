"""Dynamo's settings while memopt's models are traced and run, and what it keeps of a trace that is over."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.eval_frame import _debug_get_cache_entry_list, cached_backends

from memopt.hosts import quiet_loggers

# recompile_limit: shapes a model may be planned for; torch's default of 8 would run the ninth without a plan.
# allow_rnn: nn.LSTM and its like are traced, not broken out of the graph.
DYNAMO = {"recompile_limit": 64, "allow_rnn": True}
IGNORED = "ignore_logging_functions"


@contextmanager
def dynamo_set() -> Iterator[None]:
    """Dynamo's configuration while a model is surveyed and while it runs; the same, or the graphs would differ.

    torch 2.11 cannot write functions into its compilation metrics, and would log that, with a stack, each time. That
    `.item()` breaks the graph, which Dynamo logs in 15 lines, is in the plan's notes.
    """
    ignored = getattr(torch._dynamo.config, IGNORED, None)
    settings = DYNAMO if ignored is None else {**DYNAMO, IGNORED: {*ignored, *quiet_loggers()}}
    metrics, items = (only_critical(f"torch._dynamo.{name}") for name in ("metrics_context", "variables.tensor"))
    with torch._dynamo.config.patch(settings), metrics, items:
        yield


@contextmanager
def only_critical(name: str) -> Iterator[None]:
    """The logger of that name says nothing but what is critical."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def forget(backend: Any) -> None:
    """Have Dynamo drop what it compiled with this backend.

    A model that breaks is compiled function by function, and the functions outlive a survey: every entry of theirs
    counts towards `recompile_limit`, and the survey after the last would run them untraced, without a word. Functions
    that were also compiled for a model that runs are left as they are.
    """
    for code in [code for found in input_codes.seen if (code := found()) is not None]:
        entries = _debug_get_cache_entry_list(code)
        if entries and all(_is(entry.backend, backend) for entry in entries):
            reset_code(code)
    for key in [key for key, known in cached_backends.items() if _is(known, backend)]:
        del cached_backends[key]  # kept for torch._dynamo.reset, with all the backend holds


def _is(known: Any, backend: Any) -> bool:
    return getattr(known, "compiler_fn", known) is backend
