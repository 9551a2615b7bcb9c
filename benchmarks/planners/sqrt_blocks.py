"""Checkpointing of whole segments: Chen et al. 2016 (arXiv:1604.06174), as torch's checkpoint_sequential does it.

A segment keeps what it is given; when the backward reaches it, its whole forward runs again at once. The last segment
keeps everything. Neither asks for a budget: one plan, for whoever has the room.
"""

from __future__ import annotations

import math
from itertools import pairwise

from benchmarks.planners.answer import Answer
from benchmarks.planners.export import Work
from benchmarks.planners.schedule import Schedule
from benchmarks.planners.stages import Chain, chain_of, schedule_of, sequence


def sqrt_blocks(work: Work, budget: int) -> Answer:
    """About sqrt(n) segments of about sqrt(n) stages, the last one not run again."""
    chain = chain_of(work)
    return Answer(segmented(chain, math.isqrt(len(chain.stages) - 1) + 1, True))


def every_block(work: Work, budget: int) -> Answer:
    """Every stage a segment, the last one too, as `gradient_checkpointing_enable` of Hugging Face does."""
    chain = chain_of(work)
    return Answer(segmented(chain, len(chain.stages), False))


def segmented(chain: Chain, count: int, last_kept: bool) -> Schedule:
    """`count` segments of stages, their lengths equal within one."""
    stages = len(chain.stages)
    bounds = [stages * i // count for i in range(count + 1)]
    parts = [range(a, b) for a, b in pairwise(bounds) if a < b]
    remade = {part[-1]: part for part in (parts[:-1] if last_kept else parts)}
    return schedule_of(chain, sequence(chain, remade))
