"""The works of the GPU benchmark. Standard library only: the command that starts the workers loads no torch for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bed:
    """A preset at these sizes. config: entries of its configuration instead of its own. optimizer: as `memopt plan`
    takes it.

    budgets: to hold whatever the peers take, as memopt's doors take them; the first is the most telling.
    transformer: takes kernels for attention (flash-attention); liger: is one of Liger's model types.
    """

    text: str
    preset: str
    batch: int
    seq: int
    dtype: str
    optimizer: str
    budgets: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    transformer: bool = True
    liger: bool = False
    lowering: str = "inductor"
    steps: int = 20


# Peers redraw dropout differently, so that first losses could not be compared.
_STEADY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Dosovitskiy et al., arXiv:2010.11929, table 1.
_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

BEDS: Mapping[str, Bed] = {
    # The bed of pytorch/torchtitan#4636.
    "llama-3.2-1b": Bed("Llama 3.2 1B, B=4 S=2048, bf16, AdamW", "llama-3.2-1b", 4, 2048, "bf16", "adamw",
                        ("20GiB", "16GiB"), liger=True),
    # AdamW's states in bf16 are 32 GB beside 32 GB of weights and gradients: no 80 GB card holds a step by recomputing
    # alone. SGD without momentum has none, so activations decide: 82 GB with everything kept at this batch.
    "llama-3-8b": Bed("Llama 3 8B, B=2 S=4096, bf16, SGD without momentum", "llama-3-8b", 2, 4096, "bf16", "sgd",
                      ("64GiB", "56GiB", "48GiB"), liger=True),
    "gpt2-xl": Bed("GPT-2 XL, B=8 S=1024, bf16, AdamW, no dropout", "gpt2-xl", 8, 1024, "bf16", "adamw",
                   ("32GiB", "24GiB"), _STEADY),
    # The batch and the budgets of MONeT, arXiv:2010.14501, table 1, which counts no optimizer.
    "resnet-50": Bed("ResNet-50, B=184, fp32, SGD with momentum", "resnet-50", 184, 0, "fp32", "sgd-momentum",
                     ("8GB", "10GB", "6GB", "5GB"), transformer=False),
    "vit-l": Bed("ViT-L/16, B=128, bf16, AdamW", "vit-base", 128, 0, "bf16", "adamw", ("12GiB", "8GiB"), _VIT_L),
    "llama-tiny": Bed("Llama, 2 layers, B=2 S=64, fp32, AdamW, eager lowering", "llama-tiny", 2, 64, "fp32", "adamw",
                      (), lowering="eager", steps=2),
}  # fmt: skip
TINY = "llama-tiny"  # to try the command out: kilobytes, nothing compiled
