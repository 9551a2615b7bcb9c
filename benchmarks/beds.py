"""The models the benchmarks run: built from configurations, with random weights and data drawn from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memopt.models import from_preset
from memopt.presets import PRESETS

Inputs = dict[str, Tensor]


class LossOnly(nn.Module):
    """A model that returns its loss among other things as inputs -> loss: for nobody the rest outlives the forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Scalar loss."""
        loss: Tensor = self.model(**inputs)["loss"]
        return loss


@dataclass(frozen=True)
class Bed:
    """A model and its batch. text: one line for tables. inputs: draws the batch, on CPU."""

    text: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    def make(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[LossOnly, Inputs]:
        """The model in training mode and its inputs, the same at each call. Floating inputs get the model's dtype."""
        torch.manual_seed(0)
        model = self.build().to(device=device, dtype=dtype).train()
        given = self.inputs().items()
        return LossOnly(model), {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in given}


def tokens(vocabulary: int, batch: int, seq: int) -> Callable[[], Inputs]:
    """A batch for a causal language model."""

    def draw() -> Inputs:
        ids = torch.randint(vocabulary, (batch, seq))
        return {"input_ids": ids, "labels": ids.clone()}

    return draw


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


def of_images(text: str, preset: str, batch: int, **config: Any) -> Bed:
    """A preset's family on a batch of images, with these entries of its configuration instead of its own."""
    base = PRESETS[preset]
    work = from_preset(preset, replace(base, config={**base.config, **config}))
    return Bed(text, work.build, partial(work.inputs, batch, 0))


BEDS: Mapping[str, Bed] = {
    "llama": Bed("Llama, 8 layers, hidden 512, B=4 S=512", llama(8, 512, 1376, 8, 8000), tokens(8000, 4, 512)),
    "gpt2": Bed("GPT-2, 4 layers, hidden 768, B=4 S=512", gpt2(4, 768, 12, 50257, 1024), tokens(50257, 4, 512)),
    "llama-small": Bed("Llama, 2 layers, hidden 256, B=8 S=256", llama(2, 256, 688, 8, 4000), tokens(4000, 8, 256)),
    "gpt2-small": Bed("GPT-2, 2 layers, hidden 256, B=8 S=256", gpt2(2, 256, 4, 8000, 256), tokens(8000, 8, 256)),
    "vit": of_images("ViT, 4 layers, hidden 192, 128 pixels, B=16", "vit-base", 16, hidden_size=192,
                     num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=128, num_labels=10),
    "resnet-10": of_images("ResNet-10, 96 pixels, B=16", "resnet-18", 16, depths=[1, 1, 1, 1], num_labels=10,
                           image_size=96),
    "unet": of_images("U-Net, 3 levels of 16 channels, 128 pixels, B=4", "unet", 4, width=16, depth=3, size=128),
    "llama-tiny": Bed("Llama, 2 layers, hidden 64, B=2 S=64", llama(2, 64, 176, 4, 256), tokens(256, 2, 64)),
    "gpt2-tiny": Bed("GPT-2, 2 layers, hidden 64, B=2 S=64", gpt2(2, 64, 4, 256, 128), tokens(256, 2, 64)),
    "unet-tiny": of_images("U-Net, 2 levels of 8 channels, 32 pixels, B=2", "unet-tiny", 2),
}  # fmt: skip
