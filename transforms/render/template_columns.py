"""Finds the columns that templates read, before any row is rendered.

A column is a variable of its own name. One whose name cannot be written so is an item of `row`: `row["review id"]`.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from jinja2 import meta, nodes

ROW = "row"
"""Stands for the whole row in templates, unless the input has a column of this name."""


@dataclass(frozen=True, slots=True)
class TemplateColumns:
    """What templates read.

    Attributes:
        variables: names of their own, without `row`.
        assigned: names that templates set themselves on some way through them: columns, where an input has such.
        items: names read as `row["name"]` or `row.name`.
        uses_row: whether `row` occurs at all.
        uses_whole_row: whether it occurs in another form, such as `row | tojson`, so that any column may be read.
    """

    variables: frozenset[str] = frozenset()
    assigned: frozenset[str] = frozenset()
    items: frozenset[str] = frozenset()
    uses_row: bool = False
    uses_whole_row: bool = False

    def __or__(self, other: "TemplateColumns") -> "TemplateColumns":
        """What either reads."""
        return TemplateColumns(
            self.variables | other.variables,
            self.assigned | other.assigned,
            self.items | other.items,
            self.uses_row or other.uses_row,
            self.uses_whole_row or other.uses_whole_row,
        )

    def to_json(self) -> str:
        """For `from_json`: parsed behind the fence, read on this side of it."""
        names = (self.variables, self.assigned, self.items)
        return json.dumps([*map(sorted, names), self.uses_row, self.uses_whole_row])

    @classmethod
    def from_json(cls, text: str) -> "TemplateColumns":
        """What `to_json` wrote."""
        variables, assigned, items, uses_row, uses_whole_row = json.loads(text)
        return cls(frozenset(variables), frozenset(assigned), frozenset(items), uses_row, uses_whole_row)

    @property
    def needed(self) -> frozenset[str] | None:
        """Names to look for in an input; None for all that it has."""
        if self.uses_whole_row:
            return None
        return self.variables | self.assigned | self.items | ({ROW} if self.uses_row else set())

    def choose(self, names: Collection[str]) -> list[str]:
        """The columns read of an input with these columns, in order; some may be missing there."""
        variables = self.variables | self.assigned.intersection(names)
        if not self.uses_row:
            return sorted(variables)
        if ROW in names:
            return sorted({*variables, ROW})
        return sorted({*variables, *self.items, *(names if self.uses_whole_row else ())})


def find_columns(tree: nodes.Template) -> TemplateColumns:
    """Find the columns that a parsed template reads."""
    undeclared = frozenset(meta.find_undeclared_variables(tree))
    # jinja counts a name that is set in one branch as undeclared, since it may be read in another.
    assigned = undeclared.intersection(_list_assigned(tree)) - {ROW}
    variables = undeclared - assigned
    if ROW not in undeclared:
        return TemplateColumns(variables, assigned)
    items = list(_find_items(tree))
    # Where a template has a variable `row` of its own too, items cannot be told apart.
    rows = [node for node in tree.find_all(nodes.Name) if node.name == ROW]
    is_plain = len(rows) == len(items) and all(node.ctx == "load" for node in rows)
    columns = frozenset(items) if is_plain else frozenset[str]()
    return TemplateColumns(variables - {ROW}, assigned, columns, True, not is_plain)


def _list_assigned(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Name, nodes.Macro)):
        if isinstance(node, nodes.Macro) or node.ctx != "load":
            yield node.name


def _find_items(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Getitem, nodes.Getattr)):
        if not isinstance(node.node, nodes.Name) or node.node.name != ROW:
            continue
        if isinstance(node, nodes.Getattr):
            yield node.attr
        elif isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            yield node.arg.value
