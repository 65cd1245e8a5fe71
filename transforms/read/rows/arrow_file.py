"""Arrow's IPC files (Feather) and streams.

Part of *read* and of the scan before the run. A file's batches are read one by one; a stream has no index and is one
unit. Buffers are checked before anything looks at the values in them: what a damaged one says could end the process.
"""

import contextlib
from collections.abc import Collection, Generator, Iterator
from typing import Any

import pyarrow as pa

from moebeam.schemas.store.file_mark import FileMark
from moebeam.transforms.read.claimed_file import open_claimed

_FILE_MAGIC = b"ARROW1"


@contextlib.contextmanager
def open_arrow(
    path: str, claim: FileMark | None, names: Collection[str] | None = None
) -> Generator["pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader"]:
    """Open a file or a stream.

    Args:
        claim: see `claimed_file.open_claimed`.
        names: columns to read; None means all.
    Raises:
        pa.ArrowInvalid: it is neither.
        InputChanged: it is not as claimed.
        OSError: the file is missing, or a store failed.
    """
    with open_claimed(path, claim) as source:
        is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        open_it: Any = pa.ipc.open_file if is_file else pa.ipc.open_stream
        source.seek(0)
        reader = open_it(source)
        if names is not None:
            kept = [index for index, name in enumerate(reader.schema.names) if name in names]
            source.seek(0)
            reader = open_it(source, options=pa.ipc.IpcReadOptions(included_fields=kept, use_threads=False))
        with reader:
            yield reader


def list_batches(reader: "pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader") -> Iterator[pa.RecordBatch]:
    """The batches in order, unchecked."""
    if isinstance(reader, pa.ipc.RecordBatchStreamReader):
        yield from reader
    else:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def check_batch(batch: pa.RecordBatch) -> None:
    """Check the buffers of a batch, but not whether text is UTF-8.

    Raises:
        pa.ArrowInvalid: a buffer is not what its type needs.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if not _holds_only_bad_text(column):
                raise pa.ArrowInvalid(f"column {name!r}: {error}") from error


def _holds_only_bad_text(column: Any) -> bool:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return False
    try:
        column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary()).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
