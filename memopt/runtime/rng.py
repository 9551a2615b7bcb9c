"""Random steps that can be run again bit for bit: the generator's state before the draw is a tensor of the step.

Forward: `state = generator_state(device)`, then `draw(op, state, ...)`, which is the plain op (the generator already
stands at `state`). A copy of the draw in the backward is `draw_again(op, state, ...)`: it sets the generator to
`state`, draws, and puts the generator back where it was.
"""

from __future__ import annotations

from typing import Any

import torch

from memopt.facts import DRAWS
from memopt.program import AGAIN


def generator_state(device: str) -> torch.Tensor:
    """The device generator's state as a CPU byte tensor: 5,056 bytes on CPU (mt19937), 16 on CUDA (seed, offset)."""
    where = torch.device(device)
    return torch.cuda.get_rng_state(where) if where.type == "cuda" else torch.get_rng_state()


def _set_state(state: torch.Tensor, device: str) -> None:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_rng_state(state, where)
    else:
        torch.set_rng_state(state)


def draw(op: Any, device: str, state: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """The op as the forward runs it. state: as `generator_state` gave it just before; named here to keep it."""
    return op(*args, **kwargs)


def draw_again(op: Any, device: str, state: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """The same draw once more; the generator is left as it was found."""
    now = generator_state(device)
    _set_state(state, device)
    try:
        return op(*args, **kwargs)
    finally:
        _set_state(now, device)


AGAIN[draw] = draw_again
DRAWS.update((draw, draw_again))
