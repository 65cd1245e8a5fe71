"""What *publish* needs of a job, and its record on the store.

The launcher writes the record before the first row is answered. With it, whoever looks at a run whose launcher was
killed can price journaled answers and publish what is committed, wherever the job's own files are.
"""

import base64
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import pyarrow as pa

from moebeam.schemas.canonical import Json
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.store import storage
from moebeam.schemas.store.damage import describe_damage
from moebeam.schemas.store.record_json import RecordJson, encode_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_json import unseal_json
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.money.price_book import PriceBook


@dataclass(frozen=True, slots=True)
class PublishSpec:
    """What *publish* needs from the job.

    Attributes:
        schema: of the results, as `moebeam.schemas.tables.result_schema` makes it.
        num_input_rows: rows according to the input's footers; unreadable files have none.
        described: what the manifest says about job, model and input, as checked before the run.
        accounting: of journaled answers that are not committed, or that no shard used; None looks for none.
        views: DuckDB views over the tables, written beside them as `views.sql`; None writes none.
    """

    run_id: str
    layout: RunLayout
    schema: pa.Schema
    num_input_rows: int
    described: Mapping[str, Json]
    accounting: Accounting | None = None
    views: str | None = None


@dataclass(frozen=True, slots=True)
class _PublishRecord:
    """`publish.json`.

    Attributes:
        schema: Arrow schema, in base64.
        described: JSON text.
        price_lines: of the whole book, without its rule of one price at an instant, which was checked.
    """

    run_id: str
    schema: str
    num_input_rows: int
    described: str
    views: str | None
    provider: str | None
    model: str | None
    tag_columns: tuple[str, ...]
    book_version: str | None
    price_lines: tuple[PriceLine, ...]
    holidays: Mapping[str, frozenset[date]]
    tag_fields: tuple[str, ...] = ()


def save_spec(spec: PublishSpec) -> None:
    """Write the record of a spec with accounting; the last attempt's stays.

    Raises:
        OSError: the store failed.
    """
    accounting = spec.accounting
    assert accounting is not None, "a run has its accounting"
    book = accounting.book
    record = _PublishRecord(
        run_id=spec.run_id,
        schema=base64.b64encode(spec.schema.serialize().to_pybytes()).decode(),
        num_input_rows=spec.num_input_rows,
        described=json.dumps(spec.described, ensure_ascii=False),
        views=spec.views,
        provider=accounting.provider,
        model=accounting.model,
        tag_columns=accounting.tag_columns,
        tag_fields=accounting.tag_fields,
        book_version=accounting.book_version,
        price_lines=book.lines if book is not None else (),
        holidays=book.holidays if book is not None else {},
    )
    storage.write_whole(spec.layout.publish_record, encode_record(record))


def read_spec(layout: RunLayout) -> PublishSpec | None:
    """Read the record; None if there is none, as in runs of older versions, or if it is of another version.

    Raises:
        FileDamaged: it is not what was written; the run's next launch writes it again.
        OSError: the store failed.
    """
    try:
        content = unseal_json(storage.read_bytes(layout.publish_record))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise describe_damage(layout.publish_record, str(error)) from error
    with contextlib.suppress(ValueError):
        record = RecordJson(_PublishRecord).decode(content)
        book = (
            None
            if record.book_version is None
            else PriceBook.from_lines(record.book_version, record.price_lines, record.holidays)
        )
        return PublishSpec(
            run_id=record.run_id,
            layout=layout,
            schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record.schema))),
            num_input_rows=record.num_input_rows,
            described=json.loads(record.described),
            accounting=Accounting(
                record.run_id, book, record.provider, record.model, record.tag_columns, record.tag_fields
            ),
            views=record.views,
        )
    return None
