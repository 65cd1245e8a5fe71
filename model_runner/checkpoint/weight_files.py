"""Where a checkpoint keeps its tensors: the index and the headers of its safetensors files, without any weights.

The index is the authority: a tensor is where it says, and whatever else the files hold is a stale copy of no meaning.
Headers are read through the store, so that a checkpoint in an object store is looked at before it is copied.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from moebeam.model_runner.checkpoint.files import WEIGHTS, read_json_object, read_weights_header
from moebeam.schemas.errors import EngineLoadError, abbreviate
from moebeam.schemas.store import storage

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_METADATA = "__metadata__"
_OLD_ENDINGS = (".bin", ".bin.index.json", ".pt", ".pth")
_MAX_NAMES_SHOWN = 5
_NUM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header has it.

    Attributes:
        file: the whole path of the file.
        dtype: as safetensors names it, such as `BF16`.
        offset: of its first byte in the file.
        num_bytes: that it takes there.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    num_bytes: int = 0


class _Index(BaseModel):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]


class _Entry(BaseModel):
    """One tensor in a header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int] = Field(min_length=2)


_HEADER = TypeAdapter(dict[str, _Entry])


def list_stored_tensors(path: str) -> list[StoredTensor]:
    """Every tensor of a checkpoint, from its index or from the one file that it has.

    Raises:
        EngineLoadError: a file is missing or damaged, or the index names what is not there; says which.
    """
    found = _list_names(path)
    files = _read_index(path) if INDEX_NAME in found else None
    if WEIGHTS_NAME in found and (files is None or WEIGHTS_NAME not in files.values()):
        return _read_header(storage.join(path, WEIGHTS_NAME))
    if files is None:
        raise EngineLoadError(_explain_missing(path, found))
    index = storage.join(path, INDEX_NAME)
    named: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in files.items():
        named[file].append(name)
    missing = sorted(named.keys() - set(found))
    if missing:
        raise EngineLoadError(
            f"{index}: expected the files that it names, found {len(missing)} missing: {format_names(missing)}"
        )
    tensors: list[StoredTensor] = []
    lacking: list[str] = []
    for file, names in sorted(named.items()):
        there = {tensor.name: tensor for tensor in _read_header(storage.join(path, file))}
        tensors += [there[name] for name in names if name in there]
        lacking += [f"{name!r} in {file}" for name in names if name not in there]
    if lacking:
        raise EngineLoadError(
            f"{index}: expected tensors where it says, found {len(lacking)} not there: {format_names(lacking)}"
        )
    return tensors


def check_weight_files(path: str, *, takes_old_files: bool) -> None:
    """Check that a checkpoint's weights are there, by its index and the headers of its files.

    Args:
        takes_old_files: whether an engine reads weights that are not in safetensors.
    Raises:
        EngineLoadError: as `list_stored_tensors`.
    """
    found = _list_names(path)
    has_safetensors = WEIGHTS_NAME in found or INDEX_NAME in found
    if takes_old_files and not has_safetensors and any(name.endswith(_OLD_ENDINGS) for name in found):
        return
    list_stored_tensors(path)


def refuse_overlaid_file(path: str) -> None:
    """Refuse what `transformers` reads wrongly: a `model.safetensors` that its index calls one file among others.

    Raises:
        EngineLoadError: names the index.
    """
    found = _list_names(path)
    if WEIGHTS_NAME not in found or INDEX_NAME not in found:
        return
    files = set(_read_index(path).values())
    if WEIGHTS_NAME in files and len(files) > 1:
        raise EngineLoadError(
            f"{storage.join(path, INDEX_NAME)}: expected no {WEIGHTS_NAME} among the files that it names, for "
            "transformers reads that one alone; rename it there and on disk, or use engine 'torch'"
        )


def format_names(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    rest = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _list_names(path: str) -> list[str]:
    try:
        return storage.list_names(path)
    except OSError as error:
        raise EngineLoadError(f"{path}: expected a checkpoint folder, found: {error}") from error


def _read_index(path: str) -> dict[str, str]:
    """Tensor -> file, which lies beside the index."""
    index = storage.join(path, INDEX_NAME)
    try:
        files = _Index.model_validate(read_json_object(path, INDEX_NAME)).weight_map
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(map(str, first["loc"]))
        raise EngineLoadError(f"{index}: {part}: {first['msg']}, found {abbreviate(first['input'])}") from error
    for name, file in files.items():
        if "/" in file or "\\" in file or not file.endswith(WEIGHTS):
            raise EngineLoadError(
                f"{index}: weight_map.{name}: expected the name of a {WEIGHTS} file beside it, found {file!r}"
            )
    return files


def _explain_missing(path: str, found: Sequence[str]) -> str:
    expected = f"{path}: expected a {WEIGHTS_NAME} or a {INDEX_NAME}, found neither"
    if others := [name for name in found if name.endswith(WEIGHTS)]:
        return f"{expected}, but {format_names(others)}: write the index that names them, or rename the one file"
    if old := [name for name in found if name.endswith(_OLD_ENDINGS)]:
        return (
            f"{expected}, but {format_names(old)}, of an older format that may run code when it is read: "
            "load it once with transformers and save it with `save_pretrained`, which writes safetensors"
        )
    return expected


def _read_header(file: str) -> list[StoredTensor]:
    try:
        with storage.open_input(file) as source:
            num_file_bytes = source.seek(0, 2)
            source.seek(0)
            content = read_weights_header(source, num_file_bytes, file)
            first_byte = source.tell()
    except OSError as error:
        raise EngineLoadError(f"{file}: expected a readable file, found: {error}") from error
    try:
        header = json.loads(content)
        if isinstance(header, dict):
            header.pop(_METADATA, None)
        entries = _HEADER.validate_python(header)
    except (ValueError, RecursionError) as error:
        raise EngineLoadError(f"{file}: expected a whole safetensors file, found: {error}") from error
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        num_bits = _NUM_BITS.get(entry.dtype)
        if min(entry.shape, default=0) < 0 or (num_bits and 8 * (end - begin) != num_bits * math.prod(entry.shape)):
            raise EngineLoadError(
                f"{file}: {name}: expected {entry.dtype} of shape {list(entry.shape)[:8]}, found {end - begin} bytes"
            )
    end = first_byte + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if end != num_file_bytes:
        raise EngineLoadError(f"{file}: expected a whole safetensors file of {end} bytes, found {num_file_bytes}")
    return [
        StoredTensor(name, file, entry.dtype, entry.shape, first_byte + begin, end - begin)
        for name, entry in entries.items()
        for begin, end in [entry.data_offsets]
    ]
