"""Adapters on a Llama whose frozen weights are in 4 bits (QLoRA), planned for a GPU that is not here, or run in small.

    memopt plan examples/qlora.py:llama_3_8b --dtype bf16 --device rtx3090 --budget 12GB --allow nf4_weights
    memopt plan examples/qlora.py:llama_3_70b --dtype bf16 --device h100 --budget 48GB --allow nf4_weights
    memopt run examples/qlora.py:small --lowering eager --budget 12MB --allow nf4_weights

The planner packs the frozen weights (memopt.weights) where nothing exact fits. Each function returns a model and its
inputs; `python examples/qlora.py` trains the small one on text. The adapters are PEFT's (`pip install peft`).
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

import memopt
from memopt.models import load
from memopt.text import byte_batches

Made = tuple[nn.Module, dict[str, Tensor]]
RANK, EVERYWHERE = 16, "all-linear"
BATCH, SEQ = 4, 64


def llama_3_8b() -> Made:
    """8.03 G weights, adapters of rank 16 on every linear layer: batch 1, sequence 2048."""
    return adapted("llama-3-8b", 1, 2048)


def llama_3_70b() -> Made:
    """70.6 G weights, the same."""
    return adapted("llama-3-70b", 1, 2048)


def small() -> Made:
    """3.3 M weights over bytes, which run anywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return with_adapters(LlamaForCausalLM(config)), next(byte_batches(BATCH, SEQ))


def adapted(preset: str, batch: int, seq: int) -> Made:
    """The preset's model, frozen, with adapters; and its inputs."""
    workload = load(preset)
    return with_adapters(workload.build()), workload.inputs(batch, seq)


def with_adapters(model: nn.Module) -> nn.Module:
    """The model frozen, but for adapters of rank 16."""
    from peft import LoraConfig, get_peft_model

    found: nn.Module = get_peft_model(model, LoraConfig(r=RANK, target_modules=EVERYWHERE, lora_dropout=0.0))
    return found


def main() -> None:
    """Train the small one in less than its weights take as they are."""
    torch.manual_seed(0)
    model, _ = small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    memopt.compile(model, "12MB", optimizer=optimizer, lowering="eager", allow="nf4_weights")
    for step, batch in enumerate(islice(byte_batches(BATCH, SEQ), 5), 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    print(model.memopt.report())


if __name__ == "__main__":
    main()
