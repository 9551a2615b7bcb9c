"""The GPU benchmark as far as it goes without one: rows, time limit, what is said, what is missing, what is resumed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu import kernels, setup, updates, worker
from benchmarks.gpu.__main__ import Command, arguments, has_cuda, main
from benchmarks.gpu.beds import BEDS, TINY
from benchmarks.gpu.launch import Ended, environment, launched, run_row
from benchmarks.gpu.resume import Kept
from benchmarks.gpu.rows import Job, Row, job_of, plan_of_rows, refused
from benchmarks.gpu.told import overall, told
from benchmarks.record import read_lines
from memopt.errors import BudgetError
from memopt.presets import PRESETS
from memopt.units import resolve_budget
from memopt.workbench import OPTIMIZERS

GIB = 2**30
MADE = {"commit": "c", "torch": "2", "device": "card"}


def ran(job: Job, gib: float = 8, **more: Any) -> Row:
    """A row as a worker makes it."""
    held = {"budget": job.budget, "planned": gib * GIB, "prediction_error": 0.0, "held": True} if job.budget else {}
    times = {"peak": int(gib * GIB), "reserved": int(gib * GIB), "seconds": 0.5, "times": [0.5], "loss": 1.0}
    return asdict(job) | times | held | {"surroundings": MADE} | more


def rows_of(bed: str, answer: Callable[[Job], Row], **asked: Any) -> list[Job]:
    known, done, jobs = BEDS[bed], list[tuple[Job, Row]](), []
    job = job_of(bed, known, "cuda")
    for each in plan_of_rows(job, known, asked.get("budgets", known.budgets), asked.get("shares", ()), done):
        jobs.append(each)
        done.append((each, answer(each)))
    return jobs


def test_every_bed_is_of_a_preset_with_an_optimizer_and_budgets_that_can_be_read() -> None:
    for bed in BEDS.values():
        assert bed.preset in PRESETS
        assert bed.optimizer in OPTIMIZERS
        assert set(bed.config) <= set(PRESETS[bed.preset].config)
        assert all(resolve_budget(budget, capacity=None) for budget in bed.budgets)


def test_rows_come_in_the_order_of_what_they_tell() -> None:
    jobs = rows_of("llama-3.2-1b", ran, shares=(0.5,))
    names = [job.name for job in jobs]
    assert names[:5] == [
        "eager", "memopt at 20GiB", "HF checkpointing", "torch.compile", "torch.compile + HF checkpointing",
    ]  # fmt: skip
    assert names[-1] == "eager, once more"
    assert len(set(names)) == len(names)
    assert {"memopt at eager", "memopt at 50% of eager", "memopt, smallest", "Liger", "flash-attention 2"} <= set(names)
    assert {"torchao AdamW8bit", "saved on the host", "selective checkpointing", "memopt at 16GiB"} <= set(names)
    (half,) = (job for job in jobs if job.name == "memopt at 50% of eager")
    assert half.budget == str(4 * GIB)


def test_memopt_meets_peers_that_compute_the_same() -> None:
    jobs = rows_of("llama-3.2-1b", ran)
    met = [job.peer for job in jobs if job.peer]
    assert met == [
        "eager", "HF checkpointing", "torch.compile", "torch.compile + HF checkpointing", "torch.compile, budget 0.5",
        "torch.compile, budget 0.2",
    ]  # fmt: skip
    assert all(job.lowering == "inductor" for job in jobs if job.budget)


def test_a_peer_that_did_not_fit_is_not_met() -> None:
    jobs = rows_of("llama-3-8b", lambda job: asdict(job) | {"did_not_fit": "full"} if job.name == "eager" else ran(job))
    assert "eager" not in [job.peer for job in jobs]
    assert "torchao AdamW8bit" not in [job.name for job in jobs]  # the bed has SGD


def test_images_have_no_kernels_for_attention() -> None:
    names = [job.name for job in rows_of("resnet-50", ran)]
    assert not {"Liger", "flash-attention 2", "selective checkpointing"} & set(names)


def test_a_budget_below_a_refused_one_is_not_planned() -> None:
    job = replace(job_of("llama-3.2-1b", BEDS["llama-3.2-1b"], "cuda"), name="memopt at 16GiB", budget="16GiB")
    earlier = [asdict(replace(job, budget="17GiB")) | {"floor": 18 * GIB, "surroundings": MADE}]
    row = refused(job, earlier)
    assert row is not None
    assert told(row).endswith("refused: the floor is 18.000 GiB")
    assert refused(replace(job, budget=str(19 * GIB)), earlier) is None
    assert refused(replace(job, budget="smallest"), earlier) is None
    assert refused(replace(job, lowering="eager"), earlier) is None
    assert refused(replace(job, budget=""), earlier) is None


def test_a_row_gets_the_time_that_is_left() -> None:
    """By a clock of its own: what begins too late is left out, what takes too long is cut off, and both are said."""
    given: list[float] = []

    def launch(words: Sequence[str], limit: float, device: str) -> Ended:
        given.append(limit)
        return Ended(None)

    job = Job(TINY, "cpu", name="x")
    late = run_row(job, 100.0, lambda: 98.0, launch)
    assert told(late).endswith("left out: no time was left")
    assert given == []
    cut = run_row(job, 100.0, lambda: 60.0, launch)
    assert given == [40.0]
    assert told(cut).endswith("left out: cut off after 40 s")


def test_what_a_worker_says_becomes_its_row() -> None:
    job = Job(TINY, "cpu", name="x")
    row = run_row(job, 100.0, lambda: 0.0, lambda *_: Ended(0, 'noise\n{"peak": 5}\n'))
    assert row == asdict(job) | {"peak": 5}
    failed = run_row(job, 100.0, lambda: 0.0, lambda *_: Ended(1, "", "Traceback\nKaboom: x"))
    assert told(failed).endswith("failed: Kaboom: x")
    silent = run_row(job, 100.0, lambda: 0.0, lambda *_: Ended(-9))
    assert told(silent).endswith("failed: ended with -9")


def test_packages_that_are_missing_are_said_in_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.launch.find_spec", lambda name: None)
    for job, needs in (
        (Job(TINY, "cuda", name="x", kernels="liger"), "liger_kernel"),
        (Job(TINY, "cuda", name="x", kernels="flash-attention"), "flash_attn"),
        (Job(TINY, "cuda", name="x", optimizer="AdamW8bit"), "torchao"),
    ):
        assert told(run_row(job, 0.0)).endswith(f"not installed: {needs}")


def test_a_process_over_its_limit_is_ended_with_its_children() -> None:
    """A child that holds the same pipe would be waited for, as Inductor's compile workers would."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    assert launched([sys.executable, "-c", child], 1.0, "cpu").code is None
    assert time.monotonic() - began < 30


def test_the_allocator_is_told_to_split_its_blocks_unless_the_user_configured_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert environment("cuda")["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in environment("cpu")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "mine:1")
    assert environment("cuda")["PYTORCH_ALLOC_CONF"] == "mine:1"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "mine:1")
    assert "PYTORCH_ALLOC_CONF" not in environment("cuda")


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Command]:
    def made(answer: Callable[[Job], Row], *words: str) -> Command:
        given = ["--bed", "gpt2-xl", "--share", "--results", str(tmp_path), *words]
        return Command(arguments(given), given, lambda job, deadline: answer(job))

    return made


def test_seconds_are_divided_by_eagers_of_the_same_command(
    command: Callable[..., Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(lambda job: ran(job, seconds=0.25 if job.name == "eager" else 0.5)).run() == 0
    head, *rows = read_lines(tmp_path / "gpu_gpt2-xl.jsonl")
    assert head["command"] == f"python -m benchmarks.gpu --bed gpt2-xl --share --results {tmp_path.name}"
    assert {row["reference"] for row in rows} == {"eager"}
    assert {row["reference_seconds"] for row in rows} == {0.25}
    said = capsys.readouterr().out
    assert "at the peak of torch.compile: x 1.000 its time" in said
    assert "eager once more: x 2.000 its own time" in said


def test_where_eager_does_not_fit_checkpointing_is_the_reference(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    full = {"did_not_fit": "CUDA out of memory", "surroundings": MADE}
    assert command(lambda job: asdict(job) | full if job.name == "eager" else ran(job)).run() == 0
    _, *rows = read_lines(tmp_path / "gpu_gpt2-xl.jsonl")
    assert {row.get("reference") for row in rows if "seconds" in row} == {"HF checkpointing"}


def test_a_budget_exceeded_and_a_row_that_failed_are_exit_codes(command: Callable[..., Command]) -> None:
    assert command(lambda job: ran(job, held=False) if job.budget else ran(job)).run() == 4
    assert command(lambda job: asdict(job) | {"error": "Kaboom"} if job.compiled else ran(job)).run() == 1
    assert command(lambda job: asdict(job) | {"absent": "torchao"} if job.needs else ran(job)).run() == 0


def test_the_next_command_goes_on_where_time_ran_out(
    command: Callable[..., Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def first(job: Job) -> Row:
        return asdict(job) | {"skipped": "no time was left"} if job.compiled else ran(job)

    command(first).run()
    assert "left out: torch.compile; torch.compile + HF checkpointing;" in capsys.readouterr().out
    again: list[str] = []

    def second(job: Job) -> Row:
        again.append(job.name)
        return ran(job, seconds=0.75, **({"peak": 8 * GIB + 512} if job.name == "eager" else {}))

    command(second, "--resume").run()
    assert [name for name in again if "torch.compile" not in name] == ["eager", "eager, once more"]
    assert {"torch.compile", "memopt at torch.compile"} <= set(again)
    rows = {row["name"]: row for row in read_lines(tmp_path / "gpu_gpt2-xl.jsonl")[1:]}
    assert rows["memopt at eager"]["reference_seconds"] == 0.5  # as it ran beside the first command's eager
    assert rows["torch.compile"]["reference_seconds"] == 0.75


def test_rows_of_another_commit_are_run_again(command: Callable[..., Command]) -> None:
    command(ran).run()
    again: list[str] = []

    def other(job: Job) -> Row:
        again.append(job.name)
        return ran(job, surroundings={**MADE, "commit": "d"})

    command(other, "--resume").run()
    assert "memopt at eager" in again


def test_rows_can_be_chosen(command: Callable[..., Command]) -> None:
    asked: list[str] = []

    def answer(job: Job) -> Row:
        asked.append(job.name)
        return ran(job)

    command(answer, "--only", "torchao", "smallest").run()
    assert [name for name in asked if "torchao" not in name] == ["eager", "HF checkpointing", "memopt, smallest"]
    asked.clear()
    command(answer, "--budget", "30GiB", "28GiB", "--only", "GiB").run()
    assert asked == ["eager", "memopt at 30GiB", "HF checkpointing", "memopt at 28GiB"]


@pytest.mark.parametrize(
    "words", [["--bed", "no-such"], ["--minutes", "0"], ["--share", "1.5"], ["--device", "cpu"], ["--lowering", "x"]]
)
def test_options_out_of_range_are_usage_errors(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments(words)
    assert stopped.value.code == 2


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.NEEDED", ("torch", "no_such_package"))
    assert main([]) == 2
    assert "no_such_package not installed" in capsys.readouterr().err


@pytest.mark.skipif(has_cuda(), reason="this machine has a CUDA device")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(has_cuda(), reason="this machine has a CUDA device")
def test_updates_need_a_gpu_too_and_are_tried_out_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert updates.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(updates, "SHAPES", {"cpu": ((64, 128), (300, 7)), "cuda": ()})
    assert updates.main(["--device", "cpu", "--rounds", "2", "--dtype", "bf16", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines][:4] == ["copy", "torch foreach", "torch fused", "memopt fp32"]
    assert all(" ms " in line and line.endswith("of a copy's bandwidth") for line in lines)
    assert not list(tmp_path.iterdir())  # no figure of a CPU is a result here


def test_kernels_need_a_gpu_too_and_are_tried_out_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    assert kernels.main(["--device", "cpu", "--rounds", "2", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * len(kernels.FAMILIES) + 6
    ours = [line for line in lines if line[27:45].strip() == "memopt"]
    assert len(ours) == len(kernels.FAMILIES) + 2
    assert all(" ms " in line and " % of a " in line for line in ours)
    assert not list(tmp_path.iterdir())  # no figure of a CPU is a result here


def test_an_update_that_fails_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: list[nn.Parameter]) -> Optimizer:
        raise RuntimeError("no kernel for this\nmore")

    monkeypatch.setattr(updates, "SHAPES", {"cpu": ((64, 128),)})
    monkeypatch.setattr(updates, "entries", lambda device: [("other", broken), ("plain", torch.optim.SGD)])
    copy, other, plain = updates.compared("cpu", torch.float32, 1)
    assert other["error"] == "RuntimeError: no kernel for this"
    assert "seconds" not in other
    assert plain["bytes"] == 3 * 64 * 128 * 4
    assert plain["share"] == pytest.approx(plain["bytes"] / copy["bytes"] * copy["seconds"] / plain["seconds"])


def test_nothing_is_said_of_memopt_if_none_of_its_rows_ran() -> None:
    assert overall([ran(Job(TINY, "cpu", name="eager"))]) == "no row of memopt's ran"


def test_the_limit_in_which_a_step_still_runs_is_said() -> None:
    job = Job(TINY, "cuda", name="x", budget="smallest")
    assert told(ran(job, asked=8 * GIB, limit=8 * GIB)).endswith("held, ran with 100% of the budget to reserve")
    assert told(ran(job, asked=8 * GIB, limit=None)).endswith("but ran in none of the limits tried")


class TestWorker:
    """The parts of a worker, on the CPU."""

    def test_a_full_device_is_an_outcome_wherever_it_shows(self) -> None:
        said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which ..."
        direct = torch.OutOfMemoryError(said)
        assert worker.out_of_memory(direct) == "CUDA out of memory. Tried to allocate 2.00 GiB"
        wrapped = RuntimeError("backend failed")
        wrapped.inner_exception = direct  # type: ignore[attr-defined]  # as Dynamo has it
        assert worker.out_of_memory(wrapped) == "CUDA out of memory. Tried to allocate 2.00 GiB"
        blas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        assert worker.out_of_memory(blas) is not None
        assert worker.out_of_memory(ValueError("another")) is None

    def test_a_refusal_is_an_outcome_with_its_floor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(job: Job) -> Row:
            raise BudgetError("no", floor_bytes=7, budget_bytes=5, binding=None, ways_out=())  # type: ignore[arg-type]

        monkeypatch.setattr(worker, "measured", refuse)
        assert worker.row_of(Job(TINY, "cpu", budget="5B")) == {"floor": 7}

    def test_other_errors_are_not_taken_for_outcomes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker, "measured", lambda job: {}["no"])
        with pytest.raises(KeyError):
            worker.row_of(Job(TINY, "cpu"))

    def test_the_least_limit_is_tried_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shares of the card's memory: the budget, then more, until two steps run."""
        limits: list[float] = []

        def step() -> None:
            if limits[-1] < 0.51:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        total = type("Properties", (), {"total_memory": 2000})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        assert worker.least_limit(1000, step, optimizer) == 1020
        assert limits == [0.5, 0.51]
        assert worker.least_limit(500, step, optimizer) is None

    def test_the_first_loss_is_noted(self) -> None:
        values: Iterator[float] = iter([3.0, 2.0])
        first: list[Tensor] = []
        run = worker.noted(lambda: torch.tensor(next(values)), first)
        assert [float(run()), float(run()), *map(float, first)] == [3.0, 2.0, 3.0]

    def test_the_beds_models_build(self) -> None:
        """ViT-L and GPT-2 XL as configured, without their weights."""
        for name, parameters in (("vit-l", 304e6), ("gpt2-xl", 1558e6)):
            model, inputs = setup.bench_of(BEDS[name], "cpu").build_fake()
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
            assert len(next(iter(inputs.values()))) == BEDS[name].batch
            assert next(model.parameters()).dtype is torch.bfloat16

    def test_torchaos_optimizers_are_looked_for_in_both_places(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ImportError, match="torchao has no AdamW8bit"):
            setup.torchao("AdamW8bit")
        monkeypatch.setitem(sys.modules, "torchao.prototype.low_bit_optim", torch.optim)
        monkeypatch.setattr(setup, "TORCHAO", ("torchao.optim", "torchao.prototype.low_bit_optim"))
        assert setup.torchao("AdamW") is torch.optim.AdamW

    def test_saving_on_the_host_keeps_the_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pinned: list[bool] = []
        plain = torch.autograd.graph.save_on_cpu

        def unpinned(pin_memory: bool) -> Any:  # this machine has no memory to pin
            pinned.append(pin_memory)
            return plain(pin_memory=False)

        monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", unpinned)
        weight = torch.ones(3, requires_grad=True)
        setup.offloaded(lambda: (weight * weight).sum())().backward()
        assert pinned == [True]
        assert torch.equal(weight.grad, torch.full((3,), 2.0))


def job_in(row: Row) -> Job:
    return Job(**{field.name: row[field.name] for field in fields(Job)} | {"budget": str(row["budget"])})


@pytest.mark.long
def test_it_runs_from_beginning_to_end_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eager, checkpointing and memopt at eager's peak: every row runs; the prediction is within 1 % + 1 MiB."""
    code = main(["--device", "cpu", "--bed", TINY, "--only", "eager", "--share", "--results", str(tmp_path)])
    head, *rows = read_lines(tmp_path / f"gpu_cpu_{TINY}.jsonl")
    assert head["bed"] == TINY
    assert [r["name"] for r in rows] == ["eager", "HF checkpointing", "memopt at eager", "eager, once more"]
    assert [json.dumps(r) for r in rows if "error" in r or "skipped" in r] == []
    assert all(r["surroundings"]["date"] for r in rows)
    assert all(r["loss"] == pytest.approx(rows[0]["loss"]) for r in rows)
    assert all(Kept.of(tmp_path / f"gpu_cpu_{TINY}.jsonl").row(job_in(r)) for r in rows)  # --resume finds them all
    (ours,) = (r for r in rows if "planned" in r)
    assert abs(ours["peak"] - ours["planned"]) <= 0.01 * ours["planned"] + 2**20
    assert ours["held"]
    assert code == 0
    assert "1 of 1 budgets held" in capsys.readouterr().out
