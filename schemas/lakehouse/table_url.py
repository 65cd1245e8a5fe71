"""How job files name tables of a lakehouse: `iceberg://CATALOG/NAMESPACE.TABLE` and `delta://LOCATION`.

No URL holds a credential: catalogs and stores are configured where their libraries look for it.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from moebeam.schemas.tables import Table

ICEBERG = "iceberg://"
DELTA = "delta://"

_SUFFIXES: "dict[Table, str]" = {"results": "", "rejects": "_rejects", "ledger": "_ledger"}
_CATALOG = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class IcebergUrl:
    """A table of an Iceberg catalog.

    Attributes:
        catalog: its name in pyiceberg's own configuration.
        namespace: its levels, from the outermost.
    """

    catalog: str
    namespace: tuple[str, ...]
    name: str
    extra: Literal["iceberg"] = "iceberg"

    def __str__(self) -> str:
        return f"{ICEBERG}{self.catalog}/{'.'.join(self.identifier)}"

    @property
    def identifier(self) -> tuple[str, ...]:
        return (*self.namespace, self.name)

    def of_table(self, table: "Table") -> "IcebergUrl":
        """Where one of a run's tables goes, if its results go here."""
        return IcebergUrl(self.catalog, self.namespace, self.name + _SUFFIXES[table])


@dataclass(frozen=True, slots=True)
class DeltaUrl:
    """A Delta table.

    Attributes:
        location: its folder, a path or an object-store URL.
    """

    location: str
    extra: Literal["delta"] = "delta"

    def __str__(self) -> str:
        return f"{DELTA}{self.location}"

    def of_table(self, table: "Table") -> "DeltaUrl":
        """As `IcebergUrl.of_table`."""
        return DeltaUrl(self.location + _SUFFIXES[table])


TableUrl: TypeAlias = IcebergUrl | DeltaUrl


def parse_table_url(text: str) -> TableUrl:
    """Parse a table's URL.

    Raises:
        ValueError: says what was expected.
    """
    if text.startswith(ICEBERG):
        catalog, slash, identifier = text.removeprefix(ICEBERG).partition("/")
        levels = identifier.split(".")
        if _CATALOG.fullmatch(catalog) and slash and len(levels) > 1 and all(levels) and "/" not in identifier:
            return IcebergUrl(catalog, tuple(levels[:-1]), levels[-1])
        raise ValueError(f"expected iceberg://CATALOG/NAMESPACE.TABLE, found {text!r}")
    if text.startswith(DELTA):
        location = text.removeprefix(DELTA).rstrip("/")
        if location and "?" not in location:
            return DeltaUrl(location)
        raise ValueError(f"expected delta://FOLDER, found {text!r}")
    raise ValueError(f"expected iceberg://CATALOG/NAMESPACE.TABLE or delta://FOLDER, found {text!r}")
