"""`benchmarks.hostile`: what each way of ending counts as. The jobs themselves run in tests/integration."""

import dataclasses

import pytest

from benchmarks.hostile import KINDS, MAX_EXTRA_BYTES, format_table, judge, load_cases
from benchmarks.hostile_content.case import HostileCase, ordinary_case
from benchmarks.hostile_content.play import Ending, Played, judge_ending

ORDINARY = Played("answered", wall_s=4.0, cpu_s=3.0, peak_bytes=200 << 20)
CASE = dataclasses.replace(ordinary_case(), is_harmless=False)

GOALS = {"responses": 60, "templates": 40, "schemas": 30, "files": 20, "checkpoints": 20}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_number_of_cases_and_no_name_twice(kind: str) -> None:
    assert len(load_cases(kind)) >= GOALS[kind]


@pytest.mark.parametrize(
    ("exit_code", "text", "left", "ending"),
    [
        (0, "", {"is_done", "has_answers", "has_rejects"}, "rejected"),
        (0, "", {"is_done", "has_answers"}, "answered"),
        (3, "", {"is_done", "has_rejects"}, "rejected"),
        (2, "error: [prompt] template: no", set(), "refused"),
        (1, "error: the checkpoint cannot be loaded", set(), "refused"),
        (1, "error: step answer failed", {"has_begun"}, "stopped"),
        (1, "error: step answer failed", {"has_answers"}, "stopped"),
        (-9, "", set(), "crash"),
        (0, "", set(), "crash"),
        (1, "error: KeyError: 'x'\nThis is not expected; --debug shows where it happened.", set(), "crash"),
        (1, "Traceback (most recent call last):\n", {"is_done"}, "crash"),
    ],
)
def test_how_a_job_ended_is_told_by_its_exit_code_its_words_and_what_it_left(
    exit_code: int, text: str, left: set[str], ending: Ending
) -> None:
    names = ("is_done", "has_answers", "has_rejects", "has_begun")
    facts = {name: name in left for name in names}
    assert judge_ending(is_hung=False, exit_code=exit_code, text=text, **facts) == ending
    assert judge_ending(is_hung=True, exit_code=exit_code, text=text, **facts) == "hang"


@pytest.mark.parametrize(
    ("case", "changes", "faults"),
    [
        (CASE, {"ending": "rejected"}, ()),
        (CASE, {"ending": "refused"}, ()),
        (CASE, {"ending": "answered"}, ("answered",)),
        (ordinary_case(), {"ending": "answered"}, ()),
        (CASE, {"ending": "stopped", "lost": ("row 1",)}, ("stopped", "lost")),
        (CASE, {"ending": "rejected", "wall_s": 14.5}, ("slow",)),
        (CASE, {"ending": "rejected", "peak_bytes": ORDINARY.peak_bytes + MAX_EXTRA_BYTES + 1}, ("large",)),
        (CASE, {"ending": "hang", "wall_s": 60.0}, ("hang",)),
    ],
)
def test_a_case_is_held_against_the_ordinary_job(
    case: HostileCase, changes: dict[str, object], faults: tuple[str, ...]
) -> None:
    judged = judge("files", case, dataclasses.replace(ORDINARY, **changes), ORDINARY)  # pyright: ignore[reportArgumentType]
    assert judged.faults == faults
    assert f"| files | 1 | {int(judged.played.ending == 'rejected')} |" in format_table([judged])
