"""Names of copies lead back to the steps they were made of."""

from __future__ import annotations

import pytest

from memopt.plans import original


@pytest.mark.parametrize(
    ("step", "want"),
    [
        ("mm_3", "mm_3"),
        ("mm_3__2", "mm_3"),
        ("__and__", "__and__"),
        ("__and___1", "__and___1"),
        ("__and____12", "__and__"),
        ("_to_copy_4__1", "_to_copy_4"),
    ],
)
def test_original_takes_off_the_copy_number_alone(step: str, want: str) -> None:
    assert original(step) == want
