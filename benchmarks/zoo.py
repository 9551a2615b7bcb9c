"""Eight families of models, cut to what two cores step through in a second, and deep enough to be worth planning.

Wide batches and narrow layers: what backward needs is most of the step, so budgets of 40 % are not below what
parameters and optimizer state take alone. The families and their layers are those of the presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memopt.models import from_preset
from memopt.presets import PRESETS, Preset
from memopt.workload import Workload

# What dropout is called in the configurations of the families.
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "dropout_rate", "dropout")  # fmt: skip


def _cut(preset: str, batch: int, seq: int = 0, **config: Any) -> Preset:
    """The preset with these entries of its configuration instead of its own."""
    base = PRESETS[preset]
    return replace(base, config={**base.config, **config}, batch=batch, seq=seq)


ZOO: Mapping[str, Preset] = {
    "gpt2": _cut("gpt2-tiny", 16, 128, n_layer=8),
    "llama": _cut("llama-tiny", 16, 128, num_hidden_layers=8),
    "bert": _cut("bert-tiny", 16, 128, num_hidden_layers=8),
    "vit": _cut("vit-tiny", 32, num_hidden_layers=8, image_size=64),
    "resnet-50": _cut("resnet-50", 64, embedding_size=16, hidden_sizes=[64, 128, 256, 512], num_labels=10,
                      image_size=64),
    "t5": _cut("t5-tiny", 16, 64, num_layers=3),  # a side; with six a lowering took 129 s, beside other work
    "lstm": _cut("lstm-tiny", 512, 8, layers=4, dropout=0.1),  # cells, of which Inductor compiles each: 32 are minutes
    "unet": _cut("unet-tiny", 8, depth=3, size=64),
}  # fmt: skip


def workload(name: str, dropout: bool = True, **config: Any) -> Workload:
    """The model of that name. dropout: as the family has it, else none. config: entries of its configuration to have
    instead. KeyError for a name that is not in `ZOO`."""
    preset = ZOO[name]
    off = {} if dropout else {key: 0.0 for key in DROPOUTS if key in preset.config}
    return from_preset(name, replace(preset, config={**preset.config, **off, **config}))
