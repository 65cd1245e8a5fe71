"""A job's prompt templates: a row's columns into chat messages, sandboxed and with a budget.

Part of *render*. Jinja2's immutable sandbox keeps templates from touching the process; the budget keeps one row's
templates from looping or growing without end.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from schemas.errors import InvalidValue, JobFileError, NullValue, RowError, TemplateBudgetExceeded, TemplateFailed
from schemas.job import PromptSection
from schemas.records import Message

MAX_PROMPT_CHARACTERS = 32 << 20
_BUDGET = "_moebeam_budget"


class PromptTemplate:
    """The compiled `[prompt]` of a job; pickles as its section."""

    def __init__(self, section: PromptSection) -> None:
        """Compile.

        Raises:
            JobFileError: a template has a syntax error; names the key and the line.
        """
        self.section = section
        self._environment = _Environment()
        self._parts: list[tuple[str, jinja2.Template]] = []
        self.variables: frozenset[str] = frozenset()
        """Columns that the templates read."""
        for role, key, source in (("system", "system", section.system), ("user", "template", section.template)):
            if source is not None:
                self._parts.append((role, self._compile(key, source)))

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptTemplate, (self.section,)

    def render(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        """The messages of one row.

        Args:
            row: the columns named in `variables`, as Python values.
        Raises:
            NullValue: a template prints a column that is null.
            TemplateBudgetExceeded: a template takes more than `max_template_steps`, or prints too much.
            TemplateFailed: a template raises in any other way.
        """
        budget = _Budget(self.section.max_template_steps)
        return tuple(Message(role, self._render_part(template, row, budget)) for role, template in self._parts)

    def _compile(self, key: str, source: str) -> jinja2.Template:
        try:
            tree = self._environment.parse(source)
            self.variables |= frozenset(meta.find_undeclared_variables(tree))
            code = self._environment.compile(_Metered().visit(tree), filename=f"<[prompt] {key}>")
        except jinja2.TemplateSyntaxError as error:
            raise JobFileError(f"[prompt] {key}: line {error.lineno}: {error.message}") from error
        return self._environment.template_class.from_code(self._environment, code, self._environment.globals)

    def _render_part(self, template: jinja2.Template, row: Mapping[str, Any], budget: "_Budget") -> str:
        pieces: list[str] = []
        try:
            for piece in template.generate({**row, _BUDGET: budget}):
                budget.print(piece)
                pieces.append(piece)
        except _PrintedNullError as error:
            empty = sorted(name for name in self.variables if row.get(name, "") is None)
            raise NullValue(
                f"the template prints a null; null on this row: {', '.join(empty) or 'a nested field'}; "
                "write {{ column | default('…', true) }} to allow it"
            ) from error
        except RowError:
            raise
        except RecursionError as error:
            raise TemplateBudgetExceeded("the template calls itself without end") from error
        except Exception as error:  # a template may raise anything that its expressions can
            raise TemplateFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        return "".join(pieces)


class _PrintedNullError(Exception):
    """A template printed None."""


class _Budget:
    """What one row's templates may still do."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._num_steps = 0
        self._num_characters = 0

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps > self._max_steps:
            raise TemplateBudgetExceeded(
                f"expected at most {self._max_steps} loop iterations and calls (max_template_steps), found more"
            )

    def print(self, text: str) -> None:
        self._num_characters += len(text)
        _check_size(self._num_characters)


def _check_size(num_characters: int) -> None:
    if num_characters > MAX_PROMPT_CHARACTERS:
        raise TemplateBudgetExceeded(f"expected at most {MAX_PROMPT_CHARACTERS} characters, found more")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every loop, call and growing operator metered."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, finalize=_printable, keep_trailing_newline=True)
        cast("dict[str, Any]", self.filters).update({"moebeam_metered": _metered, "moebeam_bounded": _bounded})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_BUDGET].step()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > 64:
            raise TemplateBudgetExceeded(f"expected an exponent up to 64, found {right}")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sequence) * times)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list):
            _check_size(len(result))
        return result


class _Metered(NodeTransformer):
    """Wraps what loops iterate over, and what `~` joins, in the metering filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _wrap(node.iter, "moebeam_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _wrap(node, "moebeam_bounded")


def _wrap(expression: nodes.Node, filter_name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", expression), filter_name, [], [], None, None, lineno=expression.lineno)


@jinja2.pass_context
def _metered(context: Context, iterable: Any) -> Iterator[Any]:
    budget: _Budget = context[_BUDGET]
    for item in iterable:
        budget.step()
        yield item


def _bounded(value: Any) -> Any:
    _check_size(len(value))
    return value


def _printable(value: Any) -> Any:
    """How a column's value is printed: nested values as JSON, bytes as UTF-8, times in ISO form."""
    if value is None:
        raise _PrintedNullError
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{value[error.start]:02x} at position {error.start}"
            raise InvalidValue(f"the template prints a binary column: expected UTF-8, found {found}") from error
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=_printable)
    return value.isoformat() if hasattr(value, "isoformat") else value
