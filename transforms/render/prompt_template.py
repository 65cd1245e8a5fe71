"""A job's prompt templates: turn a row's columns into chat messages.

Part of *render*. Templates are compiled and rendered behind the fence, in `prompt_program.py`: whatever they contain,
the worker lives on, and a row that takes too much is that row's reject.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

from moebeam.model_runner.fence.fence import Program, Result
from moebeam.model_runner.fence.limits import MAX_PROMPT_CHARACTERS
from moebeam.schemas.errors import JobFileError, RowError, TemplateBudgetExceeded
from moebeam.schemas.job.sections import PromptSection
from moebeam.schemas.records import Message
from moebeam.transforms.render.prompt_program import COLUMNS_ENTRY, RENDER_ENTRY
from moebeam.transforms.render.template_columns import TemplateColumns

Messages: TypeAlias = tuple[Message, ...]


class PromptTemplate:
    """A job's `[prompt]`; pickles as its section."""

    def __init__(self, section: PromptSection) -> None:
        """Compile the templates.

        Raises:
            JobFileError: a template has a syntax error, or takes too much to compile; names the key, and the line.
        """
        self.section = section
        named = (("system", "system", section.system), ("user", "template", section.template))
        parts = [(role, key, text) for role, key, text in named if text is not None]
        self._roles = [role for role, _, _ in parts]
        source = pickle.dumps(([(key, text) for _, key, text in parts], section.max_template_steps))
        self._program = Program(RENDER_ENTRY, source, "[prompt]", section.max_template_s, "max_template_s")
        self.columns = self._find_columns()
        """Columns that the templates read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptTemplate, (self.section,)

    def render(self, row: Mapping[str, Any]) -> Messages:
        """Render the messages of one row.

        Raises:
            RowError: see `render_batch`.
        """
        (messages,) = self.render_batch([row])
        if isinstance(messages, RowError):
            raise messages
        return messages

    def render_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[Messages | RowError]:
        """The messages of each row, or its error.

        `NullValue` says that a template prints a column that is null, `TemplateBudgetExceeded` that it takes more than
        `max_template_steps`, `max_template_s` or memory, or prints too much, `TemplateFailed` that it raises.

        Args:
            rows: the columns chosen by `columns`, as Python values.
        """
        if not self._roles:
            return [()] * len(rows)
        refused = [_refuse_huge(row) for row in rows]
        results = iter(self._program.run([row for row, error in zip(rows, refused, strict=True) if error is None]))
        return [self._read(next(results) if error is None else error) for error in refused]

    def _read(self, result: Result) -> Messages | RowError:
        return result if isinstance(result, RowError) else tuple(map(Message, self._roles, cast("list[str]", result)))

    def _find_columns(self) -> TemplateColumns:
        if not self._roles:
            return TemplateColumns()
        (found,) = replace(self._program, entry=COLUMNS_ENTRY).run([None])
        if isinstance(found, RowError):
            raise JobFileError(str(found)) from found
        return TemplateColumns.from_json(cast("str", found))


def _refuse_huge(row: Mapping[str, Any]) -> RowError | None:
    """Why a row is too large to be sent to another process; None for any that may become a prompt."""
    for name, value in row.items():
        if isinstance(value, str) and len(value) > MAX_PROMPT_CHARACTERS:
            return TemplateBudgetExceeded(
                f"column {name!r}: expected at most {MAX_PROMPT_CHARACTERS:,} characters, found {len(value):,}"
            )
    return None
