"""Train a Hugging Face causal language model on ranks that share one copy of AdamW's state, within a budget each.

    torchrun --nproc-per-node 2 examples/sharded.py
    torchrun --nproc-per-node 2 examples/sharded.py --fully-shard --budget 60MB

The second shares parameters and gradients as well, by torch's fully_shard. Each rank has text of its own, from the
standard library's sources. It runs on CPUs (gloo), or on a GPU a rank (nccl).
`--budget` is what the whole step of a rank may take.
"""

from __future__ import annotations

import argparse
import os
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import memopt
from memopt.optim import Sharded
from memopt.runtime.resident import distinct_bytes, resident_tensors
from memopt.text import byte_batches
from memopt.units import format_size


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="80MB", help="bytes of a rank's step (80MB)")
    parser.add_argument("--steps", type=int, default=10, help="training steps (10)")
    parser.add_argument("--batch", type=int, default=8, help="rows of each rank (8)")
    parser.add_argument("--seq", type=int, default=128, help="bytes a row (128)")
    parser.add_argument("--fully-shard", action="store_true", help="share parameters and gradients as well (ZeRO-3)")
    return parser.parse_args()


def llama() -> nn.Module:
    """A Llama of 4.9 M parameters over bytes, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def main() -> None:
    """Train; the first rank says what came of it."""
    chosen, on_gpu = options(), torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    model = llama().to(device)
    optimizer: torch.optim.Optimizer
    if chosen.fully_shard:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    else:
        optimizer = Sharded(model.parameters(), torch.optim.AdamW, lr=3e-4)
    model = memopt.compile(model, budget=chosen.budget, optimizer=optimizer, lowering="eager")
    for step, batch in enumerate(islice(byte_batches(chosen.batch, chosen.seq, seed=rank), chosen.steps), 1):
        loss = model(**{name: ids.to(device) for name, ids in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
    states = distinct_bytes(resident_tensors([*optimizer.state.values()]))
    took = model.memopt.measured
    said = f"rank {rank}: {format_size(took.peak_bytes)} at most, {format_size(states)} of it optimizer state"
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, said)
    if rank == 0:
        print(model.memopt.report(), *every, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
