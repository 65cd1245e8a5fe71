"""Lines of a journal that are cut off, damaged, of a later version, or of no use: told, and asked again."""

import json
import logging
import zlib
from pathlib import Path

import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.journal import ShardJournal
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.durable.journal_lines import number_line
from tests.support.engines.journaled_answers import Engine, answers_of, journaled, request

POISON = {
    "a type": {"text": 5},
    "a count": {"usage": {"prompt_tokens": 10**26, "completion_tokens": 1}},
    "an estimate": {"usage": {"prompt_tokens": 1, "completion_tokens": None, "estimated_completion_tokens": 10**26}},
    "a column": {"colour": "red"},
    "an attempt": {"attempt": 2**40},
    "a time": {"started_at": "yesterday"},
    "a latency": {"latency_ms": float("inf")},
    "a reason": {"finish_reason": "because"},
    "a lost call": {"lost_calls": [{"provider": "p"}]},
}


@pytest.mark.parametrize("changes", POISON.values(), ids=POISON.keys())
def test_a_line_that_no_table_could_hold_is_set_aside_and_its_answer_asked_again(
    layout: RunLayout, changes: dict[str, object]
) -> None:
    engine = Engine()
    answers_of(layout, engine, request(0), request(1))
    (path,) = Path(layout.shard_journal("s0")).iterdir()
    first, second = path.read_bytes().splitlines(keepends=True)
    values = json.loads(first.partition(b" ")[2].partition(b" ")[2]) | changes
    poison = number_line(1, json.dumps(values).encode())
    path.write_bytes(poison + second)
    kept = read_journal(layout, "s0")
    assert (len(kept.entries), kept.num_damaged) == (1, 1)
    answers_of(layout, engine, request(0), request(1))
    assert engine.asked == ["0", "1", "0"]
    assert storage.read_bytes(f"{layout.damaged}/journal~s0~{path.name}") == poison
    answers_of(layout, engine, request(0), request(1))
    assert len(engine.asked) == 3, "its answer is kept from now on"


def test_a_line_that_was_cut_off_is_as_if_it_were_not_there(
    layout: RunLayout, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    answers_of(layout, engine, request(0), request(1))
    (path,) = Path(layout.shard_journal("s0")).iterdir()
    content = path.read_bytes()
    for size in (len(content) - 1, content.index(b"\n") + 5, content.index(b"\n") + 1):
        path.write_bytes(content[:size])
        kept = read_journal(layout, "s0")
        assert ([entry.completion.request_id for entry in kept.entries], kept.num_damaged) == (["0"], 0)
    with caplog.at_level(logging.WARNING):
        answers_of(layout, engine, request(0), request(1))
    assert engine.asked == ["0", "1", "1"]
    assert not caplog.records


def test_a_damaged_line_is_told_and_its_answer_asked_again(layout: RunLayout, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    answers_of(layout, engine, request(0), request(1))
    (path,) = Path(layout.shard_journal("s0")).iterdir()
    content = path.read_bytes().replace(b"answer 1", b"answer 9", 1)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING), ShardJournal.open(layout, "s0") as journal:
        assert [each.text for each in journaled(engine, journal).generate([request(0)])] == ["answer 3"]
        assert journal.counters["num_damaged_journal_lines"] == 1
    assert "1 lines are damaged" in caplog.text


def test_a_line_of_a_later_version_is_damaged_not_fatal(layout: RunLayout) -> None:
    answers_of(layout, Engine(), request(0))
    (path,) = Path(layout.shard_journal("s0")).iterdir()
    for content in (b"{}", b"[]", b'{"key": 1}', b"\xff"):
        with path.open("ab") as file:
            file.write(b"%08x %s\n" % (zlib.crc32(content), content))
    kept = read_journal(layout, "s0")
    assert (len(kept.entries), kept.num_damaged) == (1, 4)
