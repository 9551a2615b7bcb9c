"""The text says what the JSON says, in any console."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from memopt.planfile import diff_plans, to_plan_file
from memopt.plans import Status
from memopt.report import PlanResult
from memopt.table import render, render_diff, render_plan_file, to_text

MIB = 2**20
Make = Callable[..., PlanResult]


def shown(renderable: object) -> str:
    """The renderable as plain text."""
    out = io.StringIO()
    Console(file=out, width=120, no_color=True).print(renderable)
    return out.getvalue()


def line_of(text: str, word: str) -> str:
    """The first line that begins with this word, spaces squeezed."""
    squeezed = (" ".join(line.split()) for line in text.splitlines())
    return next(line for line in squeezed if line.startswith(word))


def test_the_report_prints_budget_in_both_units_peaks_levers_and_source_lines(make: Make) -> None:
    result = make(64 * MIB)
    text = to_text(result)
    assert line_of(text, "budget") == "budget 67.11 MB (64.00 MiB)"
    assert line_of(text, "peak") == "peak 76.55 MB 59.77 MB -21.9 %"  # 73 and 57 MiB, by hand
    assert line_of(text, "recompute") == "recompute exact 2 16.78 MB 4.00 ms"
    assert line_of(text, "modeling_tiny.py:22") == "modeling_tiny.py:22 activation 1 8.39 MB a2 8.39 MB"
    assert line_of(text, "before the step state") == "before the step state 3 12.58 MB m0 4.19 MB"
    assert "25165824 + 12582912*B" in text
    assert result.gap > 0
    assert f"gap {100 * result.gap:.2f} % of the step time (milp)" in text
    assert "AdamW with fp32 states assumed" in text


def test_a_gap_above_one_percent_says_where_it_comes_from(make: Make) -> None:
    result = make(64 * MIB)
    wide = replace(result, plan=replace(result.plan, lower_bound=0.0, solver="frontier"))
    close = replace(wide, plan=replace(wide.plan, lower_bound=wide.plan.seconds))
    assert wide.gap > 0.01
    assert "which may remake a value in part" in " ".join(to_text(wide).split())
    assert "which may remake a value in part" not in " ".join(to_text(close).split())


def test_measured_is_set_against_the_prediction(make_measured: Callable[[int, int], PlanResult]) -> None:
    assert "held, 4.19 MB to spare" in to_text(make_measured(60 * MIB, 64 * MIB))
    over = to_text(make_measured(66 * MIB, 64 * MIB))
    assert "OVER the budget by 2.10 MB" in over
    assert line_of(over, "peak").endswith("69.21 MB")


def test_infeasible_shows_the_floor_and_the_ways_out(make_refused: Callable[[int], PlanResult]) -> None:
    text = to_text(make_refused(MIB))
    assert line_of(text, "floor").startswith("floor 52.43 MB (50.00 MiB)")
    assert line_of(text, "set by") == "set by loss_backward, aten.loss_backward, modeling_tiny.py:30"
    assert line_of(text, "--batch 2") == "--batch 2 exact 31.46 MB 0 s fits"
    assert line_of(text, "allow=").endswith("100 ms still over")
    assert "lower bound" not in text
    assert "proof" not in text


def test_no_escape_codes_without_a_terminal_and_ascii_where_that_is_all_there_is(make: Make) -> None:
    assert "\x1b" not in to_text(make(64 * MIB))
    written = io.BytesIO()
    raw = io.TextIOWrapper(written, encoding="ascii")
    Console(file=raw, width=100).print(render(make(64 * MIB)))  # raises UnicodeEncodeError if a sign is not ascii
    raw.flush()
    assert b"recompute" in written.getvalue()


def test_markup_in_names_is_printed_not_obeyed(make: Make) -> None:
    odd = replace(make(64 * MIB), model="[bold]x[/bold]", notes=("see [/red] line",))
    assert "[bold]x[/bold]" in to_text(odd)
    assert "see [/red] line" in to_text(odd)


def test_a_step_that_fits_says_so(make: Make) -> None:
    result = make(640 * MIB)
    fits = replace(result, after=result.before, plan=replace(result.plan, chosen=(), seconds=0.0, status=Status.FITS))
    text = to_text(fits)
    assert "fits as it is" in text
    assert "no seconds added" in text
    assert "What memopt does" not in text


def test_plan_files_and_diffs_are_readable(make: Make) -> None:
    result = make(64 * MIB)
    plan = to_plan_file(result)
    assert "a1" in line_of(shown(render_plan_file(plan)), "a1")
    fewer = to_plan_file(replace(result, budget=70 * MIB, plan=replace(result.plan, chosen=result.plan.chosen[:1])))
    text = shown(render_diff(diff_plans(plan, fewer)))
    assert line_of(text, "budget") == "budget 67.11 MB (64.00 MiB) 73.40 MB (70.00 MiB)"
    assert line_of(text, "a a1") == "a a1 recompute 8.39 MB modeling_tiny.py:21"
    assert "the plans are the same (2 decisions)" in shown(render_diff(diff_plans(plan, plan)))
