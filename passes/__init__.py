"""The passes, in the order they run. One pass a file, named like its option; the order is the two tuples below."""

from __future__ import annotations

from memopt.passbase import Cleanup, Rewrite, Trade
from memopt.passes.attention import Attention
from memopt.passes.batch_statistics import BatchStatistics
from memopt.passes.few_bit import ApproxBP, FewBit
from memopt.passes.kept_outputs import KeptOutputs
from memopt.passes.late_gradients import LateGradients
from memopt.passes.late_values import LateValues
from memopt.passes.linear_cross_entropy import LinearCrossEntropy
from memopt.passes.linear_inputs import CompAct, WtaCrs
from memopt.passes.narrow_indices import NarrowIndices
from memopt.passes.offload import OffloadDisk, OffloadHost
from memopt.passes.pack_masks import PackMasks
from memopt.passes.packed_linear import PackedLinear
from memopt.passes.quantise import Fp8Activations, Int2Activations, Int4Activations, Int8Activations
from memopt.passes.recompute import Recompute
from memopt.passes.relu_masks import ReluMasks
from memopt.passes.replay_random import ReplayRandom
from memopt.passes.s2a import S2A
from memopt.passes.stream import Stream, StreamAttention
from memopt.passes.unread_inputs import UnreadInputs
from memopt.passes.weight_copies import WeightCopies

REWRITES: tuple[type[Rewrite], ...] = (  # of the forward, before it is differentiated
    Attention,
    LinearCrossEntropy,
    Stream,  # behind the loss: of heads it takes what it can
    StreamAttention,  # behind MLPs: what lies between two
    PackedLinear,  # last: of layers that stream the weight is read once for all chunks
)
CLEANUPS: tuple[type[Cleanup], ...] = (
    BatchStatistics,  # early: what is read for nothing should not be seen by any other pass
    UnreadInputs,  # as early: what is left of the readers decides what the next two may do
    KeptOutputs,  # before the photograph: one of two values is not saved at all
    ReluMasks,  # before trades propose: the masks it makes are packed by one of them
    WeightCopies,  # before trades propose: one of them makes the copies again
    LateValues,  # after what decides which values the backward reads
    LateGradients,  # after the copies of weights, which some of the gradients are made of
    ReplayRandom,  # last before the photograph: what is random must be replayable when trades propose
)
TRADES: tuple[type[Trade], ...] = (
    Recompute,  # first: of two ways to let go of a value that cost the same it adds nothing to what is saved
    PackMasks,  # exact, and without a forward run of what made the mask
    NarrowIndices,  # as the masks
    OffloadHost,  # exact, where host memory was named
    OffloadDisk,  # exact, where a disk was named
    Int8Activations,  # from here on lossy, the least first: none runs unless it was named
    Fp8Activations,
    Int4Activations,
    Int2Activations,
    S2A,
    FewBit,
    ApproxBP,
    WtaCrs,  # their variance is large: max_grad_error has to be raised for them
    CompAct,
)
