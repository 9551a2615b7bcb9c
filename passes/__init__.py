"""The passes, in the order they run. One pass a file, named like its option; the order is the two tuples below."""

from __future__ import annotations

from memopt.passbase import Cleanup, Trade
from memopt.passes.batch_statistics import BatchStatistics
from memopt.passes.recompute import Recompute
from memopt.passes.replay_random import ReplayRandom

CLEANUPS: tuple[type[Cleanup], ...] = (
    BatchStatistics,  # early: what is read for nothing should not be seen by any other pass
    ReplayRandom,  # last before the photograph: what is random must be replayable when trades propose
)
TRADES: tuple[type[Trade], ...] = (
    Recompute,  # the one trade that needs no copy engine, no consent and no calibration
)
