"""What is said of rows while they run. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.rows import EAGER, Row, is_refusal

GIB = 2**30


def outcome(row: Row) -> str:
    """Why a row has no figures, in a few words; "" if it has."""
    if "absent" in row:
        return f"not installed: {row['absent']}"
    if "skipped" in row:
        return f"left out: {row['skipped']}"
    if "did_not_fit" in row:
        return f"did not fit: {row['did_not_fit']}"
    if is_refusal(row):
        return f"refused: the floor is {row['floor'] / GIB:.3f} GiB"
    if "error" in row:
        return f"failed: {row['error'].strip().splitlines()[-1][:200]}"
    return ""


def told(row: Row) -> str:
    """One line on a row."""
    if why := outcome(row):
        return f"{row['name']:38} {why}"
    text = f"{row['name']:38} {row['peak'] / GIB:7.3f} GiB allocated"
    if row["reserved"]:
        text += f", {row['reserved'] / GIB:7.3f} GiB reserved"
    text += f", {row['seconds']:.4f} s a step"
    if "planned" in row:
        text += f", planned {row['planned'] / GIB:.3f} ({row['prediction_error']:+.2%}), "
        text += f"{'held' if row['held'] else 'EXCEEDED'}{reserving(row)}"
    return text


def reserving(row: Row) -> str:
    """In how much reserved memory memopt's step ran, as a share of its budget; "" where nobody tried."""
    if "limit" not in row:
        return ""
    if row["limit"] is None:
        return ", but ran in none of the limits tried"
    return f", ran with {row['limit'] / row['asked']:.0%} of the budget to reserve"


def overall(rows: Sequence[Row]) -> str:
    """Budgets held, the worst prediction, memopt's seconds over those of the peer whose bytes it was given, drift, and
    what is left to run."""
    lines = [held(rows), *against(rows), *drift(rows)]
    if left := [row["name"] for row in rows if "skipped" in row]:
        lines.append(f"left out: {'; '.join(left)}: the same command with --resume goes on with these")
    return "\n".join(lines)


def held(rows: Sequence[Row]) -> str:
    """Budgets held and the worst prediction."""
    ours = [row for row in rows if "planned" in row]
    if not ours:
        return "no row of memopt's ran"
    worst = max(abs(row["prediction_error"]) for row in ours)
    return f"{sum(row['held'] for row in ours)} of {len(ours)} budgets held; worst prediction off by {worst:.2%}"


def against(rows: Sequence[Row]) -> list[str]:
    """A line for each peer met."""
    named = {row["name"]: row for row in rows}
    met = [row for row in rows if row["peer"] and "seconds" in row]
    return [
        f"at the peak of {row['peer']}: x {relative(row) / relative(named[row['peer']]):.3f} its time" for row in met
    ]


def relative(row: Row) -> float:
    """Seconds over those of the reference timed by the same command, where there is one."""
    return float(row["seconds"] / row.get("reference_seconds", 1.0))


def drift(rows: Sequence[Row]) -> list[str]:
    """How much eager's seconds changed over a command that timed it twice: what the other ratios may be off by."""
    again = [row for row in rows if row["name"] != EAGER and row["name"].startswith(EAGER) and "seconds" in row]
    return [f"eager once more: x {relative(row):.3f} its own time" for row in again if row.get("reference") == EAGER]
