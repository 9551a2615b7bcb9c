"""The models memopt knows by name: published hyper-parameters, written here so that nothing is downloaded.

Data alone, free of torch, so that `memopt models` answers at once; `memopt.models` builds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["causal-lm", "masked-lm", "seq2seq", "image", "text-classifier", "segmentation"]


@dataclass(frozen=True)
class Preset:
    """text: one line for the list. model_type: the Hugging Face one, or "lstm" or "unet" (memopt/nets.py).

    config: its keyword arguments. batch, seq: the defaults; seq 0 where the model has none.
    source: where the hyper-parameters are published.
    """

    text: str
    task: Task
    model_type: str
    config: Mapping[str, Any] = field(repr=False)
    batch: int
    seq: int
    source: str


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": heads,
            "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}  # fmt: skip


def _llama3(width: int, inner: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {"vocab_size": 128256, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}} | rest  # fmt: skip


# Llama 3.2 stretches the rotary frequencies of Llama 3 to 131,072 positions and ties its embeddings.
_LLAMA32 = {
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0,
                        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192},
}  # fmt: skip

_BERT = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
         "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512}  # fmt: skip
_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "image_size": 224, "patch_size": 16,
        "num_labels": 1000}  # fmt: skip
_RESNET50 = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
             "layer_type": "bottleneck", "num_labels": 1000}  # fmt: skip
_RESNET18 = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic",
             "num_labels": 1000}  # fmt: skip
_T5 = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
       "dropout_rate": 0.1, "feed_forward_proj": "relu", "decoder_start_token_id": 0}  # fmt: skip
_LSTM = {"vocab": 20000, "width": 256, "hidden": 512, "layers": 2, "classes": 2, "dropout": 0.5}
_UNET = {"channels": 3, "classes": 2, "width": 64, "depth": 4, "size": 256}

_GPT2_PAPER = "Radford et al., Language Models are Unsupervised Multitask Learners, 2019, table 2"
_LLAMA_PAPER = "The Llama 3 Herd of Models, arXiv:2407.21783, table 3"
_LLAMA32_CARD = "the Llama 3.2 model card (llama-models, models/llama3_2) and its published config"
_OURS = "ours: the same family, small enough for tests"

PRESETS: Mapping[str, Preset] = {
    "gpt2": Preset("GPT-2, 124 M parameters", "causal-lm", "gpt2", _gpt2(768, 12, 12), 8, 1024, _GPT2_PAPER),
    "gpt2-medium": Preset("GPT-2 medium, 355 M", "causal-lm", "gpt2", _gpt2(1024, 24, 16), 4, 1024, _GPT2_PAPER),
    "gpt2-xl": Preset("GPT-2 XL, 1.56 B", "causal-lm", "gpt2", _gpt2(1600, 48, 25), 1, 1024, _GPT2_PAPER),
    "llama-3.2-1b": Preset("Llama 3.2, 1.24 B", "causal-lm", "llama",
                           _llama3(2048, 8192, 16, 32, head_dim=64, **_LLAMA32), 4, 2048, _LLAMA32_CARD),
    "llama-3.2-3b": Preset("Llama 3.2, 3.21 B", "causal-lm", "llama",
                           _llama3(3072, 8192, 28, 24, head_dim=128, **_LLAMA32), 2, 2048, _LLAMA32_CARD),
    "llama-3-8b": Preset("Llama 3, 8.03 B", "causal-lm", "llama", _llama3(4096, 14336, 32, 32), 1, 4096, _LLAMA_PAPER),
    "llama-3-70b": Preset("Llama 3, 70.6 B", "causal-lm", "llama", _llama3(8192, 28672, 80, 64), 1, 4096, _LLAMA_PAPER),
    "bert-base": Preset("BERT base uncased with its masked-language head, 110 M", "masked-lm", "bert", _BERT, 16, 512,
                        "Devlin et al., arXiv:1810.04805, section 3"),
    "vit-base": Preset("ViT-B/16 at 224 pixels, 86.6 M", "image", "vit", _VIT, 32, 0,
                       "Dosovitskiy et al., arXiv:2010.11929, table 1"),
    "resnet-50": Preset("ResNet-50, 25.6 M", "image", "resnet", _RESNET50, 32, 0,
                        "He et al., arXiv:1512.03385, table 1"),
    "resnet-18": Preset("ResNet-18, 11.7 M", "image", "resnet", _RESNET18, 32, 0,
                        "He et al., arXiv:1512.03385, table 1"),
    "t5-small": Preset("T5 small, 60.5 M", "seq2seq", "t5", _T5, 8, 512,
                       "Raffel et al., arXiv:1910.10683, section 3.7"),
    "lstm": Preset("a two-layer LSTM text classifier, 8.8 M", "text-classifier", "lstm", _LSTM, 32, 256,
                   "ours; of the family of Dai and Le, arXiv:1511.01432"),
    "unet": Preset("U-Net with batch norm, padded, at 256 pixels, 31.0 M", "segmentation", "unet", _UNET, 8, 0,
                   "Ronneberger et al., arXiv:1505.04597, figure 1; padding and batch norm added"),
    "gpt2-tiny": Preset("GPT-2, 2 layers", "causal-lm", "gpt2",
                        _gpt2(64, 2, 4) | {"vocab_size": 256, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0},
                        4, 64, _OURS),
    "llama-tiny": Preset("Llama with grouped queries, 2 layers", "causal-lm", "llama",
                         _llama3(64, 176, 2, 4) | {"vocab_size": 256, "num_key_value_heads": 2, "bos_token_id": 0,
                                                   "eos_token_id": 0}, 4, 64, _OURS),
    "bert-tiny": Preset("BERT, 2 layers", "masked-lm", "bert",
                        _BERT | {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2,
                                 "num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 128},
                        4, 64, _OURS),
    "vit-tiny": Preset("ViT, 2 layers at 32 pixels", "image", "vit",
                       _VIT | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "intermediate_size": 256, "image_size": 32, "patch_size": 8, "num_labels": 10},
                       4, 0, _OURS),
    "resnet-tiny": Preset("ResNet, 4 blocks at 32 pixels", "image", "resnet",
                          _RESNET18 | {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2],
                                       "num_labels": 10, "image_size": 32}, 4, 0, _OURS),
    "t5-tiny": Preset("T5, 2 layers", "seq2seq", "t5",
                      _T5 | {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
                             "num_heads": 4}, 4, 32, _OURS),
    "lstm-tiny": Preset("LSTM text classifier, one layer", "text-classifier", "lstm",
                        _LSTM | {"vocab": 256, "width": 16, "hidden": 32, "layers": 1, "dropout": 0.0}, 4, 16, _OURS),
    "unet-tiny": Preset("U-Net, 2 levels at 32 pixels", "segmentation", "unet",
                        _UNET | {"width": 8, "depth": 2, "size": 32}, 2, 0, _OURS),
}  # fmt: skip
