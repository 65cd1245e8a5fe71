"""A job's prompt templates: turn a row's columns into chat messages, sandboxed and with a budget.

Part of *render*. Jinja2's immutable sandbox keeps templates away from the process; the budget keeps one row's templates
from looping or growing without end.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from moebeam.schemas.errors import (
    InvalidValue,
    JobFileError,
    NullValue,
    RowError,
    TemplateBudgetExceeded,
    TemplateFailed,
)
from moebeam.schemas.job.sections import PromptSection
from moebeam.schemas.records import Message

MAX_PROMPT_CHARACTERS = 32 << 20
MAX_ARGUMENT = 1_000_000
"""Largest number accepted by filters and text methods whose output grows with it."""

GROWING_FILTERS = frozenset({"center", "slice", "batch", "indent", "wordwrap"})

NULL_FILTERS = frozenset({"default", "d", "tojson", "list", "map", "select", "reject", "selectattr", "rejectattr"})
"""Filters that accept a null; any other would turn it into the text None."""

_BUDGET = "_moebeam_budget"


class PromptTemplate:
    """A job's compiled `[prompt]`; pickles as its section."""

    def __init__(self, section: PromptSection) -> None:
        """Compile the templates.

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
        """Render the messages of one row.

        Args:
            row: the columns named in `variables`, as Python values.
        Raises:
            NullValue: a template prints a column that is null.
            TemplateBudgetExceeded: a template takes more than `max_template_steps`, or prints too much.
            TemplateFailed: a template raises anything else.
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
        except Exception as error:  # a template may raise whatever its expressions can
            raise TemplateFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        return "".join(pieces)


class _PrintedNullError(Exception):
    """A template printed None."""


class _Budget:
    """Counts the steps and characters of one row's templates."""

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
    """Jinja's sandbox, with every loop, call and growing operator metered.

    Keeps only `range` and `namespace` of Jinja's globals, so that a column may have any other name.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, finalize=_printable, keep_trailing_newline=True)
        self.globals = {name: self.globals[name] for name in ("range", "namespace")}
        metering = {"step": _step, "bounded": _check_length, "present": _refuse_null, "argument": _check_argument}
        own = {f"moebeam_{name}": function for name, function in metering.items()}
        cast("dict[str, Any]", self.filters).update({**own, "tojson": _to_json})

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Resolve `order.items` on a struct to its field, never to the method of the dict that holds it."""
        if isinstance(obj, dict):
            return cast("dict[str, Any]", obj).get(attribute, self.undefined(obj=obj, name=attribute))
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[_BUDGET].step()
        method = inspect.unwrap(obj) if callable(obj) else obj  # the sandbox wraps str.format
        text: object = getattr(method, "__self__", None)
        if isinstance(text, str):
            is_format = method.__name__ in {"format", "format_map"}
            if is_format:
                _check_format(text)
            for argument in (*args, *kwargs.values()):
                _refuse_null(argument) if is_format else _check_argument(argument)
        return _check_length(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > 64:
            raise TemplateBudgetExceeded(f"expected an exponent up to 64, found {right}")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sequence) * times)
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            for value in right if isinstance(right, tuple) else (right,):
                _refuse_null(value)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list):
            _check_size(len(result))
        return result


class _Metered(NodeTransformer):
    """Adds a step to every loop body, and checks the inputs and outputs of filters and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        step = _wrap(nodes.Const(None, lineno=node.lineno), "moebeam_step")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Expr:
        self.generic_visit(node)
        if node.name in GROWING_FILTERS:
            node.args = [_wrap(argument, "moebeam_argument") for argument in node.args]
        if node.node is not None and node.name not in NULL_FILTERS:
            node.node = _wrap(node.node, "moebeam_present")
        return _wrap(node, "moebeam_bounded")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_wrap(part, "moebeam_present") for part in node.nodes]
        return _wrap(node, "moebeam_bounded")


def _wrap(expression: nodes.Node, filter_name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", expression), filter_name, [], [], None, None, lineno=expression.lineno)


@jinja2.pass_context
def _step(context: Context, nothing: None) -> None:
    context[_BUDGET].step()


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise _PrintedNullError
    return value


def _check_argument(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
        raise TemplateBudgetExceeded(f"expected numbers up to {MAX_ARGUMENT} as arguments, found {value}")
    return value


def _check_length(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple):
        _check_size(len(cast("str", value)))
    return value


def _check_format(text: str) -> None:
    if re.search(r"[0-9]{6,}", text):
        raise TemplateBudgetExceeded(f"expected widths of at most 5 digits in a format, found {text[:80]!r}")


def _printable(value: Any) -> Any:
    """A column's value as printed: nested values as JSON, bytes as UTF-8, times in ISO form."""
    if value is None:
        raise _PrintedNullError
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{value[error.start]:02x} at position {error.start}"
            raise InvalidValue(f"the template prints a binary column: expected UTF-8, found {found}") from error
    if isinstance(value, dict | list | tuple):
        return _to_json(value)
    if callable(value) or isinstance(value, Iterator):
        raise TemplateFailed(f"expected a value to print, found {type(value).__name__}; add | list, or call it")
    return value.isoformat() if hasattr(value, "isoformat") else value


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON for prompts: nothing escaped for HTML or ASCII."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_json_scalar)


def _json_scalar(value: Any) -> str:
    return (
        value.decode() if isinstance(value, bytes) else str(value.isoformat() if hasattr(value, "isoformat") else value)
    )
