"""From a name on the command line to a `Workload`: a preset, a Hugging Face config.json, or a factory in a file.

torch and transformers are loaded when something is built, not before, so that listing and refusing are fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from memopt.factory import load_factory
from memopt.presets import PRESETS, Preset, Task
from memopt.workload import Workload, loss_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Workload", "load", "presets"]

Made = TypeVar("Made")

# task -> (the auto class that builds it, what its class names end with, its table of model types), the order in which
# a config that names no architecture is tried: a BERT config is also in the causal table, so masked comes first.
HUB: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "seq2seq": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "ForSeq2SeqLM"),
                "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image": ("AutoModelForImageClassification", ("ForImageClassification",),
              "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM",), "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
}  # fmt: skip
DEFAULTS = {"image": (8, 0)}  # batch and sequence of a config.json, where not these: 1 and the smaller of 1,024 ...
LONGEST = 1024  # ... and the positions the model has


def presets() -> Mapping[str, str]:
    """Name -> one line on the model, in the order of the table."""
    return {name: preset.text for name, preset in PRESETS.items()}


def load(spec: str) -> Workload:
    """The workload of a preset's name, a path to a config.json, or "file.py:factory".

    ValueError in one sentence for an unknown name (with the known ones) and for whatever is wrong with a file.
    """
    if spec in PRESETS:
        return from_preset(spec, PRESETS[spec])
    path, colon, factory = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return load_factory(path, factory)
    if spec.endswith(".json"):
        return _from_json(Path(spec))
    raise ValueError(
        f"model {spec!r} is not known; known are {', '.join(PRESETS)}, a Hugging Face config.json, "
        "or file.py:factory where factory() returns (model, inputs) or (model, inputs, loss_fn)"
    )


def from_preset(name: str, preset: Preset) -> Workload:
    config = dict(preset.config)
    if preset.task == "text-classifier":
        build, inputs = partial(_lstm, config), partial(_classified_text, name, config)
    elif preset.task == "segmentation":
        build, inputs = partial(_unet, config), partial(_segmented, name, config)
    else:
        hub = partial(_config, preset.model_type, config)
        build, inputs = partial(_hub_model, preset.task, hub), partial(_hub_inputs, name, preset.task, hub)
    return Workload(name, build, inputs, loss_of, preset.batch, preset.seq, preset.source)


def _from_json(path: Path) -> Workload:
    data = _read(path)
    hub = partial(_config, str(data.pop("model_type")), data)
    longest = _usable(path, lambda: _positions(hub()))
    task = _task(path, data.get("architectures"), hub)
    batch, seq = DEFAULTS.get(task, (1, min(LONGEST, longest or LONGEST)))
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    build, inputs = partial(_usable, path, partial(_hub_model, task, hub)), partial(_hub_inputs, name, task, hub)
    return Workload(name, build, inputs, loss_of, batch, seq, str(path))


def _usable(path: Path, make: Callable[[], Made]) -> Made:
    """What it makes of a config; whatever transformers and torch say of its values is one sentence on the file."""
    try:
        return make()
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} gives no usable model: {type(error).__name__}: {said}") from error


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in the file, once it is sure to name a model type transformers knows."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ValueError(f'{path} is not a Hugging Face config: it has no "model_type"')
    if data["model_type"] not in _transformers().CONFIG_MAPPING:
        version = _transformers().__version__
        raise ValueError(f"{path} has model_type {data['model_type']!r}, which transformers {version} does not know")
    return data


def _task(path: Path, architectures: object, hub: Callable[[], Any]) -> Task:
    """What the config's model is trained for: by the name of its architecture, else the first table with its type."""
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for name in names:
        for task, (_, ends, _) in HUB.items():
            if name.endswith(ends):
                return _checked(task)
    if names and not any(name.endswith("Model") for name in names):
        raise ValueError(f"{path} is a {names[0]}; memopt builds {', '.join(HUB)} models, others by file.py:factory")
    tables = _transformers().models.auto.modeling_auto
    config = hub()
    for task, (_, _, table) in HUB.items():
        if config.model_type in getattr(tables, table) and config.is_encoder_decoder == (task == "seq2seq"):
            return _checked(task)
    raise ValueError(f"{path}: a {config.model_type} is none of {', '.join(HUB)}; use file.py:factory")


def _checked(task: str) -> Task:
    return next(known for known in get_args(Task) if known == task)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("this model comes from Hugging Face transformers: pip install 'memopt[hf]'") from error
    return transformers


def _config(model_type: str, data: Mapping[str, Any]) -> Any:
    """The configuration object. use_cache is off: in training a key-value cache is only held, never read."""
    config = _transformers().CONFIG_MAPPING[model_type].from_dict(dict(data))
    for part in (config, config.get_text_config()):
        part.use_cache = False
    return config


def _hub_model(task: str, hub: Callable[[], Any]) -> nn.Module:
    """Attention is what transformers picks: SDPA wherever the model has it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    config, auto = hub(), getattr(_transformers(), HUB[task][0])
    if task == "causal-lm" and getattr(config, "loss_type", None) is None:
        config.loss_type = "ForCausalLM"  # GPT-2's class name does not say so, and transformers warns of that
    # Fake weights have no values to draw, and ViT's truncated normal looks at what it drew.
    drawn = not isinstance(torch.empty(0), FakeTensor)
    with nullcontext() if drawn else import_module("transformers.initialization").no_init_weights():
        model = auto.from_config(config, dtype=torch.get_default_dtype())  # not the dtype the file was saved in
    model.tie_weights()  # left out with the drawing
    trained: nn.Module = model.train()
    return trained


def _hub_inputs(name: str, task: str, hub: Callable[[], Any], batch: int, seq: int) -> dict[str, Tensor]:
    import torch

    config = hub()
    if task == "image":
        _check(name, batch, seq, None)
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        pixels = torch.randn(batch, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (batch,))}
    _check(name, batch, seq, _positions(config))
    ids = torch.randint(config.get_text_config().vocab_size, (batch, seq))
    return {"input_ids": ids, "labels": ids.clone()}


def _positions(config: Any) -> int:
    """Longest sequence the model can take; 0 if nothing in it ends (rotary or relative positions)."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None) or hasattr(text, "relative_attention_num_buckets"):
        return 0
    return int(getattr(text, "max_position_embeddings", 0) or 0)


def _check(name: str, batch: int, seq: int, longest: int | None) -> None:
    """ValueError unless batch and sequence suit a model with `longest` positions (0: no end; None: no sequence)."""
    if batch < 1:
        raise ValueError(f"batch {batch} asked of {name}; at least 1 works")
    if longest is None and seq:
        raise ValueError(f"sequence {seq} asked of {name}, which takes images: leave it out")
    if longest is not None and (seq < 1 or (longest and seq > longest)):
        raise ValueError(f"sequence {seq} asked of {name}; 1 to {longest or 'any length'} works")


def _lstm(config: Mapping[str, Any]) -> nn.Module:
    from memopt.nets import LstmClassifier

    return LstmClassifier(**config).train()


def _classified_text(name: str, config: Mapping[str, Any], batch: int, seq: int) -> dict[str, Tensor]:
    import torch

    _check(name, batch, seq, 0)
    labels = torch.randint(config["classes"], (batch,))
    return {"input_ids": torch.randint(config["vocab"], (batch, seq)), "labels": labels}


def _unet(config: Mapping[str, Any]) -> nn.Module:
    from memopt.nets import UNet

    return UNet(**{key: value for key, value in config.items() if key != "size"}).train()


def _segmented(name: str, config: Mapping[str, Any], batch: int, seq: int) -> dict[str, Tensor]:
    import torch

    _check(name, batch, seq, None)
    labels = torch.randint(config["classes"], (batch, config["size"], config["size"]))
    return {"pixel_values": torch.randn(batch, config["channels"], config["size"], config["size"]), "labels": labels}
