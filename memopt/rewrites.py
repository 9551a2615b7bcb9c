"""Which rewrites of the forward a request permits, and what a plan says of them."""

from __future__ import annotations

from collections.abc import Iterator

from memopt.capture import Survey
from memopt.passbase import Numerics, Rewrite
from memopt.passes import REWRITES
from memopt.report import Lever


def permitted(numerics: str, off: frozenset[str]) -> tuple[type[Rewrite], ...]:
    """Those that are not switched off by name, and of no other rounding where numerics is "exact"."""
    classes = (Numerics.EXACT,) if numerics == "exact" else (Numerics.EXACT, Numerics.REORDERED)
    return tuple(rewrite for rewrite in REWRITES if rewrite.name not in off and rewrite.numerics in classes)


def rewritten_levers(survey: Survey) -> tuple[Lever, ...]:
    """One a rewrite that changed something: its places, and the bytes that need not be held for their backwards."""
    done = {r: [site for site in survey.found.get(r.name, ()) if site.rewritten] for r in REWRITES}
    return tuple(
        Lever(rewrite.name, rewrite.numerics.value, sum(site.nbytes for site in sites), 0.0, len(sites))
        for rewrite, sites in done.items()
        if sites
    )


def left_alone(survey: Survey) -> Iterator[str]:
    """What rewrites looked at and did not change: a sentence for each reason; and where nobody knows the step without
    them."""
    if rewritten_levers(survey) and survey.plain is None:
        yield 'so large a step is not captured without its rewrites too: "without memopt" has them as well'
    for name, sites in survey.found.items():
        reasons: dict[str, list[str]] = {}
        for site in sites:
            if not site.rewritten:
                reasons.setdefault(site.refused, []).append(site.source)
        for why, lines in reasons.items():
            yield f"{name} left {', '.join(dict.fromkeys(lines))} alone: {why}"
