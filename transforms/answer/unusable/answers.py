"""Finds the answers over which a shard's tables fail, so that the others are committed.

Part of *answer*. Responses and journal lines are checked where they are read. Should one pass that the tables cannot
hold, its row becomes a reject with an unknown usage, and what came is kept in `_moebeam/damaged/`. Without this the
same answer would end every launch of the run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import pyarrow as pa

from moebeam.schemas.answers import AccountedAnswer, ValidatedAnswer
from moebeam.schemas.contract.output_type import OutputType
from moebeam.schemas.errors import CommitError, MalformedResponse, abbreviate
from moebeam.schemas.records import Completion, Usage
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.durable.commit import sum_tables
from moebeam.transforms.log_events import log_event
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.money.attempt_costs import Attempts

TABLE_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, CommitError, pa.ArrowException)
"""What building the tables raises over a value that they cannot hold."""

Check: TypeAlias = Callable[[Sequence[int]], Exception | None]


def find_unusable(
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Attempts],
    accounting: Accounting,
    output_type: OutputType | None = None,
) -> dict[int, Exception]:
    """The rows whose answers alone no table can hold, and why; looked for in halves."""

    def check(some: Sequence[int]) -> Exception | None:
        part, places = rows.restrict_to(some)
        try:
            found = {places[row]: answers[row] for row in some}
            sum_tables(shard_tables(shard, part, found, accounting, output_type))
        except TABLE_ERRORS as error:
            return error
        return None

    return _search(check, sorted(answers))


def _search(check: Check, rows: Sequence[int]) -> dict[int, Exception]:
    error = check(rows) if rows else None
    if error is None:
        return {}
    if len(rows) == 1:
        return {rows[0]: error}
    half = len(rows) // 2
    return _search(check, rows[:half]) | _search(check, rows[half:])


def reject_unusable(
    layout: RunLayout,
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Attempts],
    accounting: Accounting,
    output_type: OutputType | None = None,
) -> dict[int, Attempts]:
    """The answers, with rejects in place of those that no table can hold; these are set aside.

    Raises:
        OSError: the store failed.
    """
    kept = dict(answers)
    for row, error in find_unusable(shard, rows, answers, accounting, output_type).items():
        name = f"answer~{shard}~{row}"
        content = "\n".join(repr(each.answer.completion) for each in answers[row])
        storage.write_whole(storage.join(layout.damaged, name), content.encode(errors="backslashreplace"))
        told = f"{type(error).__name__}: {abbreviate(str(error))}"
        log_event("answer_set_aside", run=accounting.run_id, shard=shard, row=row, error=told)
        reject = MalformedResponse(f"no table can hold the answer ({told}); it is kept in _moebeam/damaged/{name}")
        kept[row] = [_reject(each, reject) for each in answers[row]]
    return kept


def _reject(answer: AccountedAnswer, error: MalformedResponse) -> AccountedAnswer:
    """A failure that is known to have been answered, and of which nothing else is kept."""
    found = answer.answer
    completion = Completion.from_error(found.completion.request_id, error, usage=Usage(None, None))
    return replace(
        answer,
        answer=ValidatedAnswer(completion, None, error, attempt=found.attempt, is_last=found.is_last),
        charge=None,
        lost_cost_at_most=None,
    )
