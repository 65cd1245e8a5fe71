"""The part of `prompt_template.py` that runs behind the fence: a job's Jinja templates, compiled, metered and rendered.

Jinja2's immutable sandbox keeps templates away from the process. The budget stops what loops or grows without end
early, always at the same place and with a number; whatever it does not know of meets the limits of the fence. It hangs
at the environment, which no template can name.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from moebeam.model_runner.fence.limits import MAX_PROMPT_CHARACTERS
from moebeam.schemas.errors import (
    JobFileError,
    NullValue,
    RowError,
    TemplateBudgetExceeded,
    TemplateFailed,
)
from moebeam.schemas.printed_values import print_json, print_value
from moebeam.transforms.render.template_columns import ROW, TemplateColumns, find_columns

RENDER_ENTRY = "moebeam.transforms.render.prompt_program:compile_prompt"
COLUMNS_ENTRY = "moebeam.transforms.render.prompt_program:list_columns"

Source: TypeAlias = "tuple[list[tuple[str, str]], int]"
"""Each template with the key of the job file that holds it, and the steps that a row may take."""

MAX_ARGUMENT = 1_000_000
"""Largest number accepted by filters and text methods whose work grows with it, and most items of a multiplied list."""

MAX_INTEGER_BITS = 1 << 17
"""Longest whole number that operators make; printed it has 40,000 digits."""

GROWING_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "wordwrap"})

NULL_FILTERS = frozenset({"default", "d", "tojson", "list", "map", "select", "reject", "selectattr", "rejectattr"})
"""Filters that accept a null; any other would turn it into the text None."""


def compile_prompt(source: Source) -> Callable[[Mapping[str, Any]], list[str]]:
    """What renders the templates over a row, in order.

    Raises:
        JobFileError: see `list_columns`.
    """
    parts, max_steps = source
    environment = _Environment()
    templates = [(key, environment.compile_part(key, text)[0]) for key, text in parts]

    def render(row: Mapping[str, Any]) -> list[str]:
        environment.budget = _Budget(max_steps)
        return [_render_part(key, template, row, environment.budget) for key, template in templates]

    return render


def list_columns(source: Source) -> Callable[[object], str]:
    """What tells the columns that the templates read, as the JSON of `TemplateColumns`.

    Raises:
        JobFileError: a template has a syntax error; names the key and the line.
    """
    columns = TemplateColumns()
    for key, text in source[0]:
        columns |= _Environment().compile_part(key, text)[1]
    return lambda _: columns.to_json()


def _render_part(key: str, template: jinja2.Template, row: Mapping[str, Any], budget: "_Budget") -> str:
    pieces: list[str] = []
    try:
        for piece in template.generate({ROW: row, **row}):
            budget.print(piece)
            pieces.append(piece)
        return "".join(pieces)
    except _PrintedNullError as error:
        empty = sorted(name for name, value in row.items() if value is None)
        raise NullValue(
            f"the template prints a null; null on this row: {', '.join(empty) or 'a nested field'}; "
            "write {{ column | default('…', true) }} to allow it"
        ) from error
    except RecursionError as error:
        raise TemplateBudgetExceeded(f"[prompt] {key}: the template calls itself without end") from error
    except TemplateBudgetExceeded as error:
        raise TemplateBudgetExceeded(f"[prompt] {key}: {error}") from error
    except (RowError, MemoryError):
        raise
    except Exception as error:  # a template may raise whatever its expressions can
        raise TemplateFailed(f"{type(error).__name__}: {' '.join(str(error)[:2000].split())[:300]}") from error


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


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every loop, call and growing operator metered; renders one row at a time.

    Keeps only `range` and `namespace` of Jinja's globals, so that a column may have any other name.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, finalize=_printable, keep_trailing_newline=True)
        self.budget = _Budget(0)
        self.globals = {name: self.globals[name] for name in ("range", "namespace")}
        metering = {"step": _step, "bounded": _check_length, "present": _refuse_null, "argument": _check_argument}
        own = {f"moebeam_{name}": function for name, function in metering.items()}
        cast("dict[str, Any]", self.filters).update({**own, "tojson": print_json})

    def compile_part(self, key: str, source: str) -> tuple[jinja2.Template, TemplateColumns]:
        """A template and the columns that it reads.

        Raises:
            JobFileError: names the key, and the line if Jinja does.
        """
        try:
            # Metered first: even to look for names, Jinja folds constants.
            tree: nodes.Template = _Metered().visit(self.parse(source))
            columns = find_columns(tree)
            code = self.compile(tree, filename=f"<[prompt] {key}>")
        except jinja2.TemplateSyntaxError as error:
            raise JobFileError(f"[prompt] {key}: line {error.lineno}: {error.message}") from error
        except MemoryError:
            raise
        except Exception as error:  # Python's own: for blocks nested too deep, or numbers too long
            raise JobFileError(f"[prompt] {key}: cannot be compiled: {type(error).__name__}: {error}") from error
        return self.template_class.from_code(self, code, self.globals), columns

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Resolve `order.items` on a struct to its field, never to the method of the dict that holds it."""
        if isinstance(obj, dict):
            return cast("dict[str, Any]", obj).get(attribute, self.undefined(obj=obj, name=attribute))
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
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
        match operator:
            case "**":
                _check_power(left, right)
            case "*":
                _check_product(left, right)
            case "+":
                if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                    _check_size(len(cast("str", left)) + len(cast("str", right)))
            case "%" if isinstance(left, str):
                _check_format(left)
                for value in right if isinstance(right, tuple) else (right,):
                    _refuse_null(value)
            case _:
                pass
        return _check_length(super().call_binop(context, operator, left, right))


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
            for keyword in node.kwargs:
                cast("nodes.Keyword", keyword).value = _wrap(cast("nodes.Keyword", keyword).value, "moebeam_argument")
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
    # With the context as an argument, the optimizer does not fold the call away.
    cast("_Environment", context.environment).budget.step()


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise _PrintedNullError
    return value


def _check_size(num_characters: int) -> None:
    if num_characters > MAX_PROMPT_CHARACTERS:
        raise TemplateBudgetExceeded(f"expected at most {MAX_PROMPT_CHARACTERS} characters, found {num_characters}")


def _check_argument(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
        raise TemplateBudgetExceeded(f"expected numbers up to {MAX_ARGUMENT} as arguments, found {_name_number(value)}")
    return value


def _check_length(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple):
        _check_size(len(cast("str", value)))
    return value


def _check_power(base: Any, exponent: Any) -> None:
    if not isinstance(exponent, int):
        return
    if abs(exponent) > 64:
        raise TemplateBudgetExceeded(f"expected an exponent up to 64, found {_name_number(exponent)}")
    if isinstance(base, int):
        _check_bits(base.bit_length() * abs(exponent))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(sequence, str):
            _check_size(len(sequence) * times)
        elif isinstance(times, int) and isinstance(sequence, list | tuple):
            num_items = len(cast("list[object]", sequence)) * times
            if num_items > MAX_ARGUMENT:
                raise TemplateBudgetExceeded(f"expected at most {MAX_ARGUMENT} items, found {_name_number(num_items)}")


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise TemplateBudgetExceeded(f"expected numbers of at most {MAX_INTEGER_BITS} bits, found {num_bits}")


def _name_number(value: int) -> str:
    """A number for a message: Python refuses to print very long ones."""
    return str(value) if value.bit_length() < 64 else f"one of {value.bit_length()} bits"


def _check_format(text: str) -> None:
    if re.search(r"[0-9]{6,}", text):
        raise TemplateBudgetExceeded(f"expected widths of at most 5 digits in a format, found {text[:80]!r}")


def _printable(value: Any) -> Any:
    """A value as printed, see `print_value`."""
    if value is None:
        raise _PrintedNullError
    if callable(value) or isinstance(value, Iterator):
        raise TemplateFailed(f"expected a value to print, found {type(value).__name__}; add | list, or call it")
    return print_value(value)
