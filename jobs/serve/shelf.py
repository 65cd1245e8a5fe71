"""The server's files and batches: records on disk, and all of them in memory.

    FOLDER/tenants/<tenant>/files/<id>.json      a record, written last: content without one is removed at a start
                                  <id>.jsonl     the content
                            batches/<id>.json
                            runs/<id>/           the batch's run, an output folder like any other
                            runs/<id>.made/      what it exported, until that is on the shelf

Records are changed on the event loop alone, and each is on disk before a client hears of it.
"""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from moebeam.jobs.serve.records import Batch, StoredFile
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import encode_record, read_record

_Record = TypeVar("_Record", StoredFile, Batch)


class Shelf:
    """All records of a server folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, Batch] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    @classmethod
    def open(cls, folder: Path) -> "Shelf":
        """Read a server folder, and remove what an upload that was cut off left in it.

        Raises:
            FileDamaged: a record is damaged.
            OutputError: the folder cannot be used.
        """
        shelf = cls(folder)
        try:
            (folder / "tenants").mkdir(parents=True, exist_ok=True)
            (folder / "tenants").chmod(0o700)
            for tenant in sorted((folder / "tenants").iterdir()):
                for path in sorted((tenant / "batches").glob("batch_*.json")):
                    if (batch := read_record(str(path), Batch, "the record of a batch")) is not None:
                        shelf.batches[batch.batch_id] = batch
                for path in sorted((tenant / "files").glob("file-*.json")):
                    if (file := read_record(str(path), StoredFile, "the record of a file")) is not None:
                        shelf.files[file.file_id] = file
                for path in (*(tenant / "files").glob("file-*.jsonl"), *(tenant / "files").glob(".*.part")):
                    if path.stem not in shelf.files:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be used as a server's folder: {error}") from error
        return shelf

    def content_path(self, file: StoredFile) -> Path:
        return self._tenant_folder(file.tenant) / "files" / f"{file.file_id}.jsonl"

    def new_content_path(self, tenant: str, file_id: str) -> Path:
        """Where an upload is written until it is whole; on the file system of its final place."""
        folder = self._tenant_folder(tenant) / "files"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".{file_id}.part"

    def run_folder(self, batch: Batch) -> Path:
        return self._tenant_folder(batch.tenant) / "runs" / batch.batch_id

    def made_folder(self, batch: Batch) -> Path:
        return self._tenant_folder(batch.tenant) / "runs" / f"{batch.batch_id}.made"

    def list_files(self, tenant: str) -> Iterator[StoredFile]:
        """A tenant's files, the latest first."""
        return (self.files[name] for name in sorted(self.files, reverse=True) if self.files[name].tenant == tenant)

    def list_batches(self, tenant: str) -> Iterator[Batch]:
        """A tenant's batches, the latest first."""
        return (
            self.batches[name] for name in sorted(self.batches, reverse=True) if self.batches[name].tenant == tenant
        )

    async def put_file(self, file: StoredFile, content: Path) -> None:
        """Take a whole content, and then its record; both are on disk when this returns."""
        target = self.content_path(file)

        def keep() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(content, target)
            storage.write_whole(str(target.with_suffix(".json")), encode_record(file))

        await asyncio.to_thread(keep)
        self.files[file.file_id] = file

    async def remove_file(self, file: StoredFile) -> None:
        """Remove a record and then its content."""
        del self.files[file.file_id]
        path = self.content_path(file)

        def remove() -> None:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)

        await asyncio.to_thread(remove)

    async def put_batch(self, batch: Batch) -> Batch:
        """Keep a batch as it is now; of changes that overlap, the last one is what stays on disk."""
        self.batches[batch.batch_id] = batch
        path = self._tenant_folder(batch.tenant) / "batches" / f"{batch.batch_id}.json"
        async with self._locks.setdefault(batch.batch_id, asyncio.Lock()):
            content = encode_record(self.batches[batch.batch_id])
            await asyncio.to_thread(_write, path, content)
        return self.batches[batch.batch_id]

    async def remove_made(self, batch: Batch) -> None:
        """Remove what a batch exported, once it is on the shelf."""
        await asyncio.to_thread(shutil.rmtree, self.made_folder(batch), ignore_errors=True)

    def _tenant_folder(self, tenant: str) -> Path:
        return self.folder / "tenants" / tenant


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(str(path), content)
