"""The models the benchmarks run: built from configurations, with random weights and data drawn from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


class LossOnly(nn.Module):
    """A Hugging Face model as inputs -> loss, so that for nobody the logits outlive the forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Scalar loss."""
        loss: Tensor = self.model(**inputs).loss
        return loss


@dataclass(frozen=True)
class Bed:
    """A causal language model and the shape of its batch. text: one line for tables."""

    text: str
    build: Callable[[], nn.Module]
    vocabulary: int
    batch: int
    seq: int

    def make(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[LossOnly, Inputs]:
        """The model in training mode and its inputs, the same at each call."""
        torch.manual_seed(0)
        model = self.build().to(device=device, dtype=dtype).train()
        ids = torch.randint(self.vocabulary, (self.batch, self.seq)).to(device)
        return LossOnly(model), {"input_ids": ids, "labels": ids.clone()}


def llama(layers: int, hidden: int, inner: int, heads: int, vocabulary: int, **rest: Any) -> Callable[[], nn.Module]:
    """A Llama with half as many key-value heads as heads."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, use_cache=False, **rest,
        )  # fmt: skip
        model: nn.Module = LlamaForCausalLM(config)
        return model

    return build


def gpt2(layers: int, hidden: int, heads: int, vocabulary: int, positions: int) -> Callable[[], nn.Module]:
    """GPT-2 without dropout: peers redraw it differently, so gradients could not be compared."""

    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=positions,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model: nn.Module = GPT2LMHeadModel(config)
        return model

    return build


BEDS: Mapping[str, Bed] = {
    "llama": Bed("Llama, 8 layers, hidden 512, B=4 S=512", llama(8, 512, 1376, 8, 8000), 8000, 4, 512),
    "gpt2": Bed("GPT-2, 4 layers, hidden 768, B=4 S=512", gpt2(4, 768, 12, 50257, 1024), 50257, 4, 512),
    "llama-tiny": Bed("Llama, 2 layers, hidden 64, B=2 S=64", llama(2, 64, 176, 4, 256), 256, 2, 64),
    "gpt2-tiny": Bed("GPT-2, 2 layers, hidden 64, B=2 S=64", gpt2(2, 64, 4, 256, 128), 256, 2, 64),
}
