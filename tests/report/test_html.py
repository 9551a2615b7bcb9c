"""The page is whole by itself, escapes what it shows, and its picture says what the timeline says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from memopt.chart import COLUMNS, bands, columns, panel, ticks
from memopt.chart import Scale as ChartScale
from memopt.graph import Step
from memopt.html import to_html
from memopt.report import PlanResult
from memopt.timeline import peak, timeline

MIB = 2**20
VOID = {"meta", "rect", "line", "circle", "path"}
Make = Callable[..., PlanResult]


class Balanced(HTMLParser):
    """Checks that tags close in the order they open, and collects every URL-bearing attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("block", [1, 512])
def test_the_bands_add_up_to_the_timeline_at_every_step(make: Make, block: int) -> None:
    for graph in (make(64 * MIB).before, make(64 * MIB).after):
        steps = tuple(replace(step, workspace=1000 * at) for at, step in enumerate(graph.steps))
        worked = replace(graph, steps=steps)
        assert tuple(map(sum, zip(*bands(worked, block), strict=True))) == timeline(worked, block)


def test_columns_keep_the_peak_and_do_not_cross_phases(make: Make) -> None:
    result = make(64 * MIB, layers=700)  # 700 x 4 steps: several a column
    drawn = columns(result.after, result.seconds_of)
    assert len(drawn) <= COLUMNS
    assert max(column.total for column in drawn) == peak(result.after)
    assert all(a.end == b.start for a, b in pairwise(drawn))
    phases = [result.after.steps[column.step].phase for column in drawn]
    assert phases == sorted(phases, key=("forward", "backward", "optimizer").index)
    assert drawn[-1].end == pytest.approx(result.step_seconds, rel=0.02)


def test_a_sliver_of_an_optimizer_is_named_all_the_same(make: Make) -> None:
    result = make(64 * MIB)
    slow = {name: (0.0001 if name.startswith("adamw") else 1.0) for name in result.seconds}
    assert to_html(replace(result, seconds=slow)).count(">optimizer</text>") == 2


def test_steps_without_a_price_are_still_drawn(make: Make) -> None:
    graph = make(64 * MIB).before

    def free(_: Step) -> float:
        return 0.0

    drawn = columns(graph, free)
    assert all(column.end > column.start for column in drawn)


@pytest.mark.parametrize("top", [1, 9, 1000, 77_000_000, 24 * 10**9])
def test_ticks_are_few_round_and_within(top: int) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert found[-1] <= top
    assert len(found) <= 7


def test_the_budget_line_stands_where_its_bytes_are(make: Make) -> None:
    result = make(50 * MIB)
    drawn = columns(result.after, result.seconds_of)
    scale = ChartScale(drawn[-1].end, 100 * MIB)
    svg = panel(result.after, drawn, scale, result.budget, "test", {})
    found = re.search(r'class="budget" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', svg)
    assert found
    assert float(found[1]) == pytest.approx((scale.y(0) + scale.y(100 * MIB)) / 2, abs=0.1)
    assert 'class="peak over"' in svg  # 57 MiB against 50
    assert 'class="budget"' not in panel(result.after, drawn, scale, 101 * MIB, "test", {})


def test_a_measured_phase_is_a_line_at_its_bytes(make: Make, make_measured: Make) -> None:
    page = to_html(make_measured(60 * MIB, 64 * MIB))
    assert page.count('class="measured"') == 3  # one a phase, with the plan alone
    assert 'class="measured"' not in to_html(make(64 * MIB))
    result = make(64 * MIB)
    drawn = columns(result.after, result.seconds_of)
    svg = panel(result.after, drawn, ChartScale(1.0, 100 * MIB), 64 * MIB, "t", {"backward": 50 * MIB, "sideways": 1})
    (found,) = re.findall(r'class="measured".*?y1="([\d.]+)"', svg)
    assert float(found) == pytest.approx((ChartScale(1.0, 2).y(0) + ChartScale(1.0, 2).y(2)) / 2, abs=0.1)


def pages(make: Make, make_refused: Make, make_measured: Make) -> list[str]:
    results = (make(64 * MIB), make_refused(MIB), make_measured(60 * MIB, 64 * MIB))
    return [to_html(result) for result in results]


def test_every_page_is_balanced_and_loads_nothing(make: Make, make_refused: Make, make_measured: Make) -> None:
    for page in pages(make, make_refused, make_measured):
        parser = Balanced()
        parser.feed(page)
        assert not parser.open
        assert not parser.links
        assert not re.search(r"https?://|url\(|@import|//cdn", page)


def test_the_page_shows_both_timelines_source_lines_levers_and_timings(make: Make) -> None:
    page = to_html(make(64 * MIB))
    assert page.count("<svg") == 2
    for phase in ("forward", "backward", "optimizer"):
        assert page.count(f'class="phase {phase}"') == 2
    for text in ("peak 76.55 MB", "peak 59.77 MB", "modeling_tiny.py:22", "recompute", "16.78 MB", "4.00 ms", "1.50 s"):
        assert text in page
    data = [json.loads(found) for found in re.findall(r'application/json">(.*?)</script>', page)]
    assert [len(points) for points in data] == [14, 16]  # one a step while they are few


def test_the_infeasible_page_shows_the_ways_out(make_refused: Make) -> None:
    page = to_html(make_refused(MIB))
    assert page.count("<svg") == 1
    assert "loss_backward" in page
    assert "--batch 2" in page
    assert "allow=(&quot;adamw8bit&quot;,)" in page


def test_a_step_that_fits_as_it_is_is_drawn_once_with_its_measurement(make_measured: Make) -> None:
    result = make_measured(60 * MIB, 64 * MIB)
    page = to_html(replace(result, after=result.before))
    assert page.count("<svg") == 1
    assert page.count('class="measured"') == 3


def test_names_from_the_user_cannot_break_out(make: Make) -> None:
    result = make(64 * MIB)
    steps = tuple(replace(step, source="</script><script>alert(1)</script>") for step in result.after.steps)
    odd = replace(result, model="<img src=x>", after=replace(result.after, steps=steps), notes=("<b>bold</b>",))
    page = to_html(odd)
    assert "<img" not in page
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    parser = Balanced()
    parser.feed(page)
    assert not parser.open


def test_the_page_is_the_same_for_the_same_result(make: Make) -> None:
    assert to_html(make(64 * MIB)) == to_html(make(64 * MIB))
