"""How long a sequence fits, beside per-layer checkpointing. `python -m benchmarks.long_sequence`.

The budget is the measured peak of a Llama-like step, AdamW included, with Hugging Face's checkpointing at a base
length. memopt plans ever longer sequences within it, to the longest that fits, and runs that one; both are timed there
in turn (checkpointing is far over the budget at that length, and needs the machine's memory for it).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memopt
from benchmarks.record import RESULTS, surroundings, write_lines
from memopt.api import make_request
from memopt.runtime.here import device_of
from memopt.runtime.measure import measure_step
from memopt.session import Session

HIDDEN, INTER, LAYERS, HEADS, GROUPS, VOCABULARY = 256, 1024, 4, 4, 2, 8000
UNIT = 128  # positions by which lengths differ
MOST = 16  # times the base length that is tried at most
Row = dict[str, Any]


class Step:
    """One model at one length, as a training loop has it."""

    def __init__(self, seq: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, vocab_size=VOCABULARY, max_position_embeddings=1 << 17, use_cache=False,
        )  # fmt: skip
        self.model: nn.Module = LlamaForCausalLM(config).train()
        tokens = torch.randint(0, VOCABULARY, (1, seq))
        self.inputs = {"input_ids": tokens, "labels": tokens}
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def measured(self, repeats: int) -> tuple[int, float]:
        """(peak bytes, seconds)"""
        found = measure_step(
            lambda: self.model(**self.inputs).loss, self.optimizer, resident=[self.model, self.inputs], repeats=repeats
        )
        return found.peak_bytes, found.seconds


def checkpointed(seq: int) -> Step:
    """With Hugging Face's checkpointing, a layer at a time."""
    step = Step(seq)
    step.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return step


def planned(seq: int, budget: int, lowering: str) -> bool:
    """Whether a plan holds this length within the budget."""
    step = Step(seq)
    request = make_request(device_of(step.model), budget, step.optimizer, (), "reordered", lowering, "", 1, "long")
    try:
        Session(step.model, request, advise=False).plan_for((), step.inputs)
    except memopt.BudgetError:
        return False
    return True


def longest(base: int, budget: int, lowering: str) -> int:
    """The longest sequence that memopt plans within the budget."""
    low, high = base // UNIT, MOST * base // UNIT
    while high - low > 1:
        middle = (low + high) // 2
        fits = planned(middle * UNIT, budget, lowering)
        print(f"  {middle * UNIT} positions: {'fit' if fits else 'do not fit'}", file=sys.stderr)
        low, high = (middle, high) if fits else (low, middle)
    return low * UNIT


def compared(seq: int, budget: int, lowering: str, rounds: int) -> Row:
    """Both at this length, in turn."""
    mine, theirs = Step(seq), checkpointed(seq)
    memopt.compile(mine.model, budget, optimizer=mine.optimizer, example_inputs=mine.inputs, lowering=lowering)
    predicted = mine.model.memopt.plan.peak
    peak, _ = mine.measured(1)
    their_peak, _ = theirs.measured(1)
    pairs = [(mine.measured(1)[1], theirs.measured(1)[1]) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "seq": seq, "predicted": predicted, "measured": peak, "checkpointing_measured": their_peak,
        "seconds": median(a for a, _ in pairs), "checkpointing_seconds": median(b for _, b in pairs),
        "ratio": median(ratios), "ratios": [ratios[0], ratios[-1]],
        "chunks": mine.model.memopt._session.latest.chunks,
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Print and write one row. 1 if the budget was not held."""
    parser = argparse.ArgumentParser(prog="long_sequence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=int, default=512, help="length at which checkpointing sets the budget")
    parser.add_argument("--lowering", default="eager", choices=("eager", "inductor"), help="memopt's lowering")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, in turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(words)
    budget, _ = checkpointed(asked.base).measured(0)
    if not planned(asked.base, budget, asked.lowering):
        print(
            f"{asked.base} positions are too few: the update alone takes more than {budget / 1e6:.1f} MB",
            file=sys.stderr,
        )
        return 2
    seq = longest(asked.base, budget, asked.lowering)
    row = {"base": asked.base, "budget": budget, "lowering": asked.lowering, "times": seq / asked.base}
    row |= compared(seq, budget, asked.lowering, asked.rounds)
    print(
        f"budget {budget / 1e6:.1f} MB: checkpointing {asked.base} positions, memopt {seq} ({row['times']:.2f} x), "
        f"measured {row['measured'] / 1e6:.1f} MB, predicted {row['predicted'] / 1e6:.1f} MB; at {seq} positions "
        f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][1]:.2f}) of checkpointing's time, which takes "
        f"{row['checkpointing_measured'] / 1e6:.1f} MB there"
    )
    write_lines(asked.results / "long_sequence.jsonl", [{"surroundings": surroundings()}, row])
    return 0 if row["measured"] <= budget else 1


if __name__ == "__main__":
    sys.exit(main())
