"""Every model the command line can name: its published size, a build without memory, and a real step of the small."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memopt.models import load, presets
from memopt.text import byte_batches, stdlib_bytes
from memopt.workload import Workload, loss_of

# Parameters as published (model cards, torchvision and timm tables; BERT with its decoder bias, T5 v1.0 tied).
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-xl": 1_557_611_200, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "bert-base": 109_514_298, "vit-base": 86_567_656, "resnet-50": 25_557_032, "resnet-18": 11_689_512,
    "t5-small": 60_506_624,
}  # fmt: skip
# Ours: 20,000 x 256 + 4 * 512 * (256 + 512 + 2) + 4 * 512 * (512 + 512 + 2) + 2 * 513; U-Net: figure 1 of the paper,
# 64 to 1024 channels, 31.0 M.
OURS = {"lstm": 8_799_234, "unet": 31_037_698}
TINY = [name for name in presets() if name.endswith("-tiny")]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step(workload: Workload, model: torch.nn.Module, batch: int, seq: int) -> torch.Tensor:
    loss = workload.loss(model(**workload.inputs(batch, seq)))
    torch.autograd.backward(loss)
    return loss.detach()


def test_the_large_and_the_tiny_are_all_there() -> None:
    assert {*PUBLISHED, *OURS, *TINY} == set(presets())
    assert {name.removesuffix("-tiny") for name in TINY} == {
        "gpt2", "llama", "bert", "vit", "t5", "unet", "resnet", "lstm"
    }  # fmt: skip
    assert all(text and "\n" not in text for text in presets().values())


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_a_model_of_any_size_builds_without_memory_at_its_published_size(name: str) -> None:
    workload = load(name)
    with FakeTensorMode():
        model = workload.build()
        inputs = workload.inputs(workload.batch, workload.seq)
    assert count(model) == (PUBLISHED | OURS)[name]
    assert all(isinstance(tensor, FakeTensor) for tensor in (*model.parameters(), *model.buffers(), *inputs.values()))
    assert inputs["labels"].shape[0] == workload.batch
    assert model.training


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_takes_a_real_step_and_every_parameter_learns(name: str) -> None:
    workload = load(name)
    torch.manual_seed(0)
    model = workload.build()
    loss = step(workload, model, workload.batch, workload.seq)
    assert loss.isfinite()
    assert loss > 0
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    # A bias under a softmax (the keys' one) cancels out and learns nothing but rounding; no other may stand still.
    still = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert [n for n in still if "embed" not in n and not n.endswith("bias")] == []


@pytest.mark.parametrize("name", TINY)
def test_inputs_follow_batch_sequence_and_seed(name: str) -> None:
    workload = load(name)
    seq = 8 if workload.seq else 0
    torch.manual_seed(3)
    first = workload.inputs(3, seq)
    torch.manual_seed(3)
    second = workload.inputs(3, seq)
    assert all(tensor.shape[0] == 3 for tensor in first.values())
    assert "input_ids" not in first or first["input_ids"].shape == (3, 8)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "bert-tiny", "vit-tiny", "t5-tiny"])
def test_hugging_face_models_train_with_sdpa_and_without_a_cache(name: str) -> None:
    config: Any = load(name).build().config
    assert config._attn_implementation == "sdpa"
    assert not getattr(config, "use_cache", False)


def test_weights_come_in_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load("llama-tiny").build()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_same_seed_builds_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(load("gpt2-tiny").build().state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("name", "batch", "seq", "why"),
    [
        ("gpt2", 1, 4096, "1 to 1024 works"),
        ("llama-tiny", 1, 0, "1 to any length works"),
        ("llama-tiny", 0, 8, "at least 1 works"),
        ("vit-tiny", 1, 16, "takes images"),
        ("unet-tiny", 1, 16, "takes images"),
        ("lstm-tiny", -1, 16, "at least 1 works"),
    ],
)
def test_sizes_the_model_cannot_take_are_refused(name: str, batch: int, seq: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load(name).inputs(batch, seq)


@pytest.mark.parametrize("spec", ["", "gpt3", "llama", "model.py", "LLAMA-3-8B", "a:b"])
def test_an_unknown_name_is_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(ValueError, match="is not known; known are gpt2, gpt2-medium") as caught:
        load(spec)
    assert all(name in str(caught.value) for name in presets())


# config.json


def small(model_type: str, **rest: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": model_type, "vocab_size": 99, **sizes, **rest}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "causal": (small("mistral", num_key_value_heads=1, architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
    "causal by type": (small("qwen2", num_key_value_heads=2), "Qwen2ForCausalLM"),
    "masked": (small("roberta", architectures=["RobertaForMaskedLM"]), "RobertaForMaskedLM"),
    "masked by type": (small("bert", architectures=["BertModel"]), "BertForMaskedLM"),
    "image": ({**small("vit", image_size=32, patch_size=8), "architectures": ["ViTForImageClassification"]},
              "ViTForImageClassification"),
    "seq2seq": ({"model_type": "t5", "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1,
                 "num_heads": 2, "decoder_start_token_id": 0}, "T5ForConditionalGeneration"),
}  # fmt: skip


def written(folder: Path, data: object) -> str:
    path = folder / "config.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_becomes_the_model_its_architecture_names(case: str, tmp_path: Path) -> None:
    config, architecture = CONFIGS[case]
    workload = load(written(tmp_path, config))
    model = workload.build()
    assert type(model).__name__ == architecture
    assert workload.name == tmp_path.name
    assert step(workload, model, 2, 16 if workload.seq else 0).isfinite()


def test_a_config_as_published_is_read_and_its_dtype_is_left_to_the_caller(tmp_path: Path) -> None:
    """Llama 3.2's spelling: rotary scaling apart from its base, the dtype of the saved file, the library's version."""
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = small("llama", architectures=["LlamaForCausalLM"], num_key_value_heads=1, max_position_embeddings=131072,
                   rope_scaling=scaling, rope_theta=500000.0, torch_dtype="bfloat16", tie_word_embeddings=True,
                   transformers_version="4.45.0.dev0", use_cache=True)  # fmt: skip
    workload = load(written(tmp_path, config))
    model: Any = workload.build()
    assert (workload.batch, workload.seq) == (1, 1024)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    assert model.config.use_cache is False
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no "model_type"'),
        ({"hidden_size": 3}, 'has no "model_type"'),
        ({"model_type": "nosuch"}, "has model_type 'nosuch', which transformers"),
        (small("bert", architectures=["BertForTokenClassification"]), "is a BertForTokenClassification; memopt builds"),
        ({"model_type": "wav2vec2"}, "a wav2vec2 is none of seq2seq, image, masked-lm, causal-lm"),
    ],
)
def test_a_bad_config_is_one_sentence(data: object, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        load(written(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.json: No such file"):
        load(str(tmp_path / "nowhere.json"))


# file.py:factory

FACTORIES = """
import torch
from torch import nn
from helper import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)
    def forward(self, x, y):
        return (self.layer(x) - y).square().mean()

class Variadic(nn.Module):
    def forward(self, *x):
        return x[0].sum()

def named(): return Net().eval(), {"x": torch.ones(5, WIDTH), "y": torch.zeros(5, 1)}
def ordered(): return Net(), (torch.ones(5, WIDTH), torch.zeros(5, 1))
def with_loss(): return nn.Linear(WIDTH, 2), (torch.ones(5, WIDTH),), lambda out: out.sum()
def no_loss(): return nn.Linear(WIDTH, 2), (torch.ones(5, WIDTH),)
def one(): return Net()
def swapped(): return {"x": torch.ones(1)}, Net()
def too_many(): return Net(), (1, 2, 3)
def loose(): return Net(), torch.ones(5, WIDTH)
def not_a_loss(): return Net(), (), 3
def variadic(): return Variadic(), (torch.ones(1),)
def broken(): raise RuntimeError("no weights here")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "helper.py").write_text("WIDTH = 3\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(FACTORIES, encoding="utf-8")
    return lambda name: f"{tmp_path / 'mine.py'}:{name}"


@pytest.mark.parametrize("name", ["named", "ordered", "with_loss"])
def test_a_factory_gives_model_inputs_and_loss(name: str, factory: Callable[[str], str]) -> None:
    workload = load(factory(name))
    model = workload.build()
    assert model.training
    assert (workload.batch, workload.seq) == (0, 0)
    assert step(workload, model, 0, 0).isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with FakeTensorMode():
        assert all(isinstance(parameter, FakeTensor) for parameter in workload.build().parameters())


def test_a_factory_fixes_its_sizes(factory: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="fixes its own inputs"):
        load(factory("named")).inputs(4, 0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one", "has to return .model, inputs."),
        ("swapped", "has to return .model, inputs."),
        ("too_many", "do not fit the model's forward"),
        ("loose", "inputs that are a Tensor"),
        ("not_a_loss", "cannot be called"),
        ("variadic", "takes unnamed inputs"),
        ("broken", "RuntimeError: no weights here"),
    ],
)
def test_a_bad_factory_is_one_sentence(name: str, why: str, factory: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=why):
        load(factory(name)).inputs(0, 0)


def test_a_factory_that_is_not_there_is_named(factory: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no function 'nosuch'; it has named, ordered"):
        load(factory("nosuch"))
    with pytest.raises(ValueError, match="there is no file"):
        load(f"{tmp_path}/other.py:named")
    (tmp_path / "bad.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not load: ZeroDivisionError"):
        load(f"{tmp_path}/bad.py:named")


def test_no_loss_anywhere_is_refused(factory: Callable[[str], str]) -> None:
    workload = load(factory("no_loss"))
    with pytest.raises(ValueError, match="no loss in the model's output, a Tensor"):
        step(workload, workload.build(), 0, 0)


def test_a_loss_is_found_where_models_put_it() -> None:
    loss, logits = torch.tensor(2.0), torch.ones(3)
    for output in (loss, {"loss": loss, "logits": logits}, (loss, logits)):
        assert loss_of(output) is loss


# The demo's text


def test_the_text_is_real_and_the_same_every_time() -> None:
    assert len(stdlib_bytes(10_000)) == 10_000
    assert stdlib_bytes(20_000).startswith(stdlib_bytes(10_000))
    assert b"import " in stdlib_bytes(10_000)
    batches = [list(islice(byte_batches(2, 16, seed), 2)) for seed in (1, 1, 2)]
    assert torch.equal(batches[0][1]["input_ids"], batches[1][1]["input_ids"])
    assert not torch.equal(batches[0][0]["input_ids"], batches[2][0]["input_ids"])
    assert bytes(batches[0][0]["labels"][0].tolist()) in stdlib_bytes(2**20)
    with pytest.raises(ValueError, match="raise limit"):
        next(byte_batches(1, 100, 0, limit=100))


def test_the_list_of_models_loads_no_torch() -> None:
    code = "import sys, memopt.models as m; m.presets(); m.load('gpt2'); print({'torch', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert found.stdout.strip() == "set()"
