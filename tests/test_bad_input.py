"""Bad input of every kind: one clear sentence, the right exception or exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import memopt
from memopt.cli import app
from memopt.files import write_atomic
from memopt.planfile import save_plan
from memopt.runtime import opcache

X = torch.zeros(8, 16)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


BUDGETS = [
    ("24Gb", "small b means bits"),
    ("24", "a unit is missing"),
    ("much", "that is no amount of memory"),
    ("", "that is no amount of memory"),
    (0, "leaves 0 bytes"),
    (-5, "leaves -5 bytes"),
    (1.5e9, "that is no amount of memory"),
    (True, "that is no amount of memory"),
    (None, "that is no amount of memory"),
    ("-9000TB", "leaves"),
    ("9000TB", "of a device that has"),
    ("120%", "of a device that has"),
]


@pytest.mark.parametrize(("budget", "says"), BUDGETS)
def test_a_budget_that_is_none_lists_the_accepted_forms(budget: Any, says: str) -> None:
    for door in (lambda m: memopt.compile(m, budget), lambda m: memopt.plan(m, (X,), budget=budget)):
        with pytest.raises(ValueError, match=says) as caught:
            door(model())
        assert '"24GiB" (2^30' in str(caught.value)
        assert "\n" not in str(caught.value)


OPTIONS = [
    ({"numerics": "fast"}, "numerics='fast' is not known; known are exact, reordered"),
    ({"lowering": "tvm"}, "lowering='tvm' is not known; known are auto, inductor, eager"),
    ({"passes": "-recomputation"}, "passes='recomputation' is not known; known are attention, linear_cross_entropy,"),
    ({"allow": ("adamw9bit",)}, "allow='adamw9bit' is not known"),
    ({"allow": "adamw9bit"}, "allow='adamw9bit' is not known"),
    ({"accumulate": 0}, "accumulate=0 refused"),
    ({"accumulate": True}, "accumulate=True refused"),
    ({"gradients": "some"}, "gradients='some' is not known; known are loss, all"),
    ({"numerics": "exact", "lowering": "inductor"}, "needs lowering=\"eager\""),
    ({"optimizer": "adamw"}, "optimizer must be a torch.optim.Optimizer, not str"),
    ({"optimizer": torch.optim.SGD([torch.zeros(2)])}, "optimizer updates none of this model's parameters"),
    ({"plan_file": 3}, "plan_file must be a path or a loaded plan file, not int"),
    ({"plan_file": "/no/such/plan.json"}, "cannot read plan file /no/such/plan.json"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "says"), OPTIONS)
def test_an_unknown_option_lists_the_known_ones_and_leaves_the_model_alone(given: dict[str, Any], says: str) -> None:
    untouched = model()
    for door in (
        lambda: memopt.compile(untouched, "1GB", **given),
        lambda: memopt.plan(untouched, (X,), budget="1GB", **given),
    ):
        with pytest.raises(ValueError, match=says.replace("(", r"\(")) as caught:
            door()
        assert "\n" not in str(caught.value)
    assert untouched._compiled_call_impl is None
    assert not hasattr(untouched, "memopt")


def on_two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, device="meta"))


def frozen() -> nn.Module:
    return model().requires_grad_(False)


MODELS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: "gpt2", ValueError, "must be a torch.nn.Module, not str"),
    (on_two_devices, ValueError, "lie on cpu, meta"),
    (lambda: nn.Linear(4, 4, device="meta"), ValueError, "on 'meta'"),
    (frozen, memopt.CaptureError, "no gradient is asked for"),
]


@pytest.mark.parametrize(("make", "kind", "says"), MODELS)
def test_a_model_that_cannot_be_planned_is_refused(make: Any, kind: type[Exception], says: str) -> None:
    made = make()
    with pytest.raises(kind, match=says):
        memopt.compile(made, "1GB", example_inputs=(X,), lowering="eager")
    with pytest.raises(kind, match=says):
        memopt.plan(made, (X,), budget="1GB", lowering="eager")
    assert not hasattr(made, "memopt")


@pytest.mark.parametrize("inputs", [5, "words", None])
def test_inputs_that_are_none_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="example_inputs must be a tensor, a tuple of positional or a mapping"):
        memopt.plan(model(), inputs, budget="1GB")


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="device 'h900' is not known; known are h200, h100"):
        memopt.plan(model(), (X,), budget="1GB", device="h900")


def test_a_wrong_level_of_debug_output_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOPT_DEBUG", "verbose")
    with pytest.raises(ValueError, match="MEMOPT_DEBUG='verbose' is not known; known are 0, 1, 2, 3"):
        memopt.plan(model(), (X,), budget="1GB", lowering="eager")


def test_a_dump_folder_that_is_a_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MEMOPT_DUMP", str(tmp_path / "taken"))
    with pytest.raises(ValueError, match=r"MEMOPT_DUMP=.* cannot be a folder: File exists"):
        memopt.plan(model(), (X,), budget="1GB", lowering="eager")


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(memopt.plan(model(), (X,), budget="1GB", lowering="eager"), path)
    return path.read_text(encoding="utf-8")


DAMAGES: list[tuple[Callable[[str], str], str]] = [
    (lambda text: text[: len(text) // 2], "cut short or not JSON"),
    (lambda text: "", "cut short or not JSON"),
    (lambda text: '{"a": 1}', "is not a memopt plan file"),
    (lambda text: text.replace('"schema": 1', '"schema": 99'), "has schema 99"),
    (lambda text: text.replace('"budget": 1000000000', '"budget": 1'), "changed after it was saved"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_damaged_plan_file_is_refused_at_both_doors(
    plan_text: str, damage: Callable[[str], str], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(damage(plan_text), encoding="utf-8")
    with pytest.raises(memopt.PlanFileError, match=says):
        memopt.plan(model(), (X,), budget="1GB", plan_file=path)
    done = CliRunner().invoke(app, ["plan", "llama-tiny", "--plan", str(path)])
    assert done.exit_code == 2
    assert done.stdout == ""


def test_a_plan_of_another_model_or_torch_is_refused(plan_text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text, encoding="utf-8")
    other = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(memopt.PlanFileError, match="of another model, shape or setting"):
        memopt.plan(other, (X,), budget="1GB", lowering="eager", plan_file=path)


COMMANDS = [
    ("plan gpt9 --budget 1GB", "model 'gpt9' is not known; known are gpt2"),
    ("plan llama-tiny", "--budget is missing"),
    ("plan llama-tiny --budget 24Gb", "small b means bits"),
    ("plan llama-tiny --budget 0B", "leaves 0 bytes"),
    ("plan llama-tiny --budget 1GB --device h900", "device 'h900' is not known"),
    ("plan llama-tiny --budget 200GB --device h200", "of a device that has"),
    ("plan llama-tiny --budget 1GB --optimizer lion", "optimizer 'lion' is not known; known are adamw"),
    ("plan llama-tiny --budget 1GB --dtype fp8", "--dtype"),
    ("plan llama-tiny --budget 1GB --batch 0", "--batch"),
    ("plan llama-tiny --budget 1GB --allow adamw9bit", "allow='adamw9bit' is not known"),
    ("plan llama-tiny --budget 1GB --passes -nosuch", "passes='nosuch' is not known"),
    ("plan llama-tiny --budget 1GB --host-budget 1GB", "host_budget is for steps on a GPU"),
    ("plan llama-tiny --budget 1GB --nosuch", "--nosuch"),
    ("plan llama-tiny --budget 1GB --html /no/such/folder/r.html", "cannot write"),
    ("plan config-that-is-not-there.json --budget 1GB", "cannot read config-that-is-not-there.json"),
    ("plan file-that-is-not-there.py:make --budget 1GB", "there is no file"),
    ("run llama-tiny --budget 1GB --optimizer none", "choose an optimizer"),
    ("run llama-tiny --budget 1GB --device h200", "not here to run on"),
    ("fit llama-tiny --budget 1GB --vary width", "--vary"),
    ("fit vit-tiny --budget 1GB --vary seq", "has no seq to vary"),
    ("show /no/such/plan.json", "cannot read plan file"),
    ("diff /no/a.json /no/b.json", "cannot read plan file /no/a.json"),
    ("nosuch", "nosuch"),
]


@pytest.mark.parametrize(("words", "says"), COMMANDS)
def test_a_command_that_cannot_be_run_exits_2_with_one_sentence(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "h200" in words and torch.cuda.is_available() and words.startswith("run"):
        pytest.skip("the device is here")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


FACTORIES = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, middle=lambda x: x):
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(8, 8), nn.Linear(8, 1), middle
    def forward(self, x, scale):
        return self.b(self.middle(self.a(x))).sum() * scale

INPUTS = {"x": torch.zeros(4, 8), "scale": 2.0}
def frozen(): return Net().requires_grad_(False), INPUTS
def two():
    net = Net()
    net.b.to("meta")
    return net, INPUTS
def leaves(): sys.exit(7)
def lookup(x): return x * {}["scale"]
def fails(): return Net(lookup), INPUTS
def missing(): return Net(), {"x": INPUTS["x"]}
def half(): return Net().half().to(torch.float32), INPUTS
"""
MADE = [
    ("frozen", "no gradient is asked for: none of the model's parameters requires one"),
    ("two", "the model's tensors lie on cpu, meta; memopt plans for one device"),
    ("leaves", "user.py:leaves failed: SystemExit: 7"),
    ("fails", "the model's forward fails on these inputs at"),
    ("missing", "do not fit the model's forward: scale is missing"),
]


@pytest.mark.parametrize(("name", "says"), MADE)
def test_a_factory_that_cannot_be_planned_exits_2_with_one_sentence(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(FACTORIES)
    done = CliRunner().invoke(app, ["plan", f"{tmp_path}/user.py:{name}", "--budget", "1GB", "--lowering", "eager"])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_factory_may_convert_its_model(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(FACTORIES)
    done = CliRunner().invoke(app, ["plan", f"{tmp_path}/user.py:half", "--budget", "1GB", "--lowering", "eager"])
    assert done.exit_code == 0, done.stderr


def test_a_file_that_leaves_the_process_exits_2(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("import sys; sys.exit(7)")
    done = CliRunner().invoke(app, ["plan", f"{tmp_path}/user.py:make", "--budget", "1GB"])
    assert done.exit_code == 2
    assert "user.py does not load: SystemExit: 7" in done.stderr


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 100}  # fmt: skip
VALUES = [("hidden_size", "abc", "expected int, got str"), ("hidden_size", 65, "not a multiple of the number"),
          ("hidden_act", "nosuch", "nosuch"), ("num_hidden_layers", None, "expected int, got NoneType")]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "says"), VALUES)
def test_a_config_with_a_value_that_is_none_exits_2_with_one_sentence(
    key: str, value: object, says: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({**BERT, key: value}))
    done = CliRunner().invoke(app, ["plan", f"{tmp_path}/config.json", "--budget", "1GB", "--lowering", "eager"])
    assert done.exit_code == 2
    assert f"{tmp_path}/config.json gives no usable model: " in done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


QUIET = """
import sys
import torch
from torch import nn

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        y = self.a(x)
        return (self.b(y) if y.sum().item() > 0 else y).sum()

def make(): return Branch(), (torch.ones(4, 8),)

class Picky(Branch):
    def forward(self, x):
        y = self.a(x)
        return (y / len({}["scale"]) if y.sum().item() < 1e9 else y).sum()

def picky(): return Picky(), (torch.ones(4, 8),)
"""


# In the run itself, as in any torch.compile, Dynamo looks at .grad of what crosses the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_real_step_that_the_users_code_ends_exits_2_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(QUIET)
    words = ["run", f"{tmp_path}/user.py:picky", "--budget", "1GB", "--lowering", "eager"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert f"the model's forward fails on these inputs at {tmp_path}/user.py:19 in forward: KeyError" in done.stderr


def test_running_a_model_that_branches_on_its_data_says_nothing_of_torchs_own(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(QUIET)
    words = ("run", f"{tmp_path}/user.py:make", "--budget", "1GB", "--lowering", "eager", "--accumulate", "2", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "memopt", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["held"] is True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_and_nothing_else(
    number: signal.Signals, exists: bool, tmp_path: Path
) -> None:
    path = tmp_path / "costs.json"
    if exists:
        path.write_text("old", encoding="utf-8")
    code = (
        "import os, sys; from memopt.files import write_atomic\n"
        f"os.fsync = lambda handle: os.kill(os.getpid(), {int(number)})\n"
        "write_atomic(sys.argv[1], 'new')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parent.parent)
    assert done.returncode == -number
    assert [p.name for p in tmp_path.iterdir()] == (["costs.json"] if exists else [])
    assert not exists or path.read_text(encoding="utf-8") == "old"


def test_files_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for _ in range(2):  # new, then replaced
        write_atomic(tmp_path / "ours", "text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_costs_are_kept_whole_beside_those_already_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "opcosts" / "cpu.json"
    opcache.save(path, {"a": (1.0, 2, 3)})
    opcache.save(path, {"b": (4.0, 5, 6)})
    assert set(json.loads(path.read_text(encoding="utf-8"))["costs"]) == {"a", "b"}
    assert os.listdir(path.parent) == ["cpu.json"]
