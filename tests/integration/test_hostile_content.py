"""Two cases of each kind of hostile content, each met by a real job; `python -m benchmarks.hostile` plays all."""

import random
from pathlib import Path

import pytest

from benchmarks.hostile import KINDS, load_cases, play_kind

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_content_ends_in_a_reject_or_a_refusal_and_costs_no_other_row(kind: str, tmp_path: Path) -> None:
    cases = random.Random(f"18 {kind}").sample(load_cases(kind), 2)
    judged = [*play_kind(kind, cases, tmp_path, num_ordinary=1)]
    # How long it takes says little on a machine at work, so here nobody asks.
    assert [(one.name, one.faults, one.played.words) for one in judged if set(one.faults) - {"slow"}] == []
