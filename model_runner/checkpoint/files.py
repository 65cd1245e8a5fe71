"""The files of a checkpoint: reading them with errors that name them, and the digest that pins them."""

import hashlib
import json
import re
from typing import Any, BinaryIO, cast

import tokenizers

from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage

MAX_WHOLE_BYTES = 64 * 1024 * 1024
"""Larger weight files are sampled by `compute_checkpoint_revision`."""

NUM_SAMPLED_BLOCKS = 64
NUM_BLOCK_BYTES = 64 * 1024
WEIGHTS = ".safetensors"
_MAX_HEADER_BYTES = 32 << 20
"""Of a weight file; one of 100,000 tensors takes 12 MB, and some ten times as much once it is read."""

MAX_FILE_BYTES = 256 << 20
"""Most bytes of a file that is read whole; the largest tokenizer that we know has 35 MB."""

MAX_JSON_BYTES = 32 << 20
"""The same for configuration and indexes."""

_NUM_LENGTH_BYTES = 8
_PINNED_NAMES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
)

ENCODER_FOLDER = "encoding"
_ENCODER = re.compile(rf"({ENCODER_FOLDER}/)?encoding_\w+\.py")


def read_checkpoint_file(path: str, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of one file of a checkpoint folder.

    Raises:
        EngineLoadError: the file cannot be read, or has more than `max_bytes`.
    """
    file = storage.join(path, name)
    try:
        with storage.open_input(file) as source:
            content = source.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise EngineLoadError(f"{file}: expected a file of a Hugging Face checkpoint, found none") from error
    except OSError as error:
        raise EngineLoadError(f"{file}: expected a readable file, found: {error}") from error
    if len(content) > max_bytes:
        raise EngineLoadError(f"{file}: expected at most {max_bytes >> 20} MiB, found more")
    return content


def read_json_object(path: str, name: str) -> dict[str, Any]:
    """One JSON file of a checkpoint folder.

    Raises:
        EngineLoadError: the file cannot be read or does not hold a JSON object.
    """
    content = read_checkpoint_file(path, name, MAX_JSON_BYTES)
    try:
        value: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EngineLoadError(f"{storage.join(path, name)}: expected JSON, found: {error}") from error
    if not isinstance(value, dict):
        raise EngineLoadError(f"{storage.join(path, name)}: expected a JSON object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def read_tokenizer(path: str) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint folder; it neither truncates nor pads, whatever its file says.

    Raises:
        EngineLoadError: `tokenizer.json` is missing or damaged.
    """
    content = read_checkpoint_file(path, "tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust extension raises bare Exception
        raise EngineLoadError(
            f"{storage.join(path, 'tokenizer.json')}: expected a Hugging Face `tokenizers` file, found: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_weights_header(source: BinaryIO, num_file_bytes: int, file: str) -> bytes:
    """The header of a safetensors file, which is JSON; `source`, at its first byte, is left at that of the data.

    Raises:
        EngineLoadError: the file is shorter than it says, or is none.
    """
    num_header_bytes = int.from_bytes(source.read(_NUM_LENGTH_BYTES), "little")
    if num_header_bytes > _MAX_HEADER_BYTES or _NUM_LENGTH_BYTES + num_header_bytes > num_file_bytes:
        raise EngineLoadError(
            f"{file}: expected a whole safetensors file, found {num_file_bytes} bytes, whose first eight "
            f"announce a header of {num_header_bytes}"
        )
    return source.read(num_header_bytes)


def list_checkpoint_files(path: str) -> list[str]:
    """Names of the files of a checkpoint folder that shape answers, sorted; those of `encoding/` with that folder.

    They are configuration, tokenizer, chat template, the authors' encoder and every `*.safetensors` with its index.

    Raises:
        EngineLoadError: the folder cannot be listed, or there is no `config.json`.
    """
    try:
        found = storage.list_names(path)
        encoders = storage.list_names(storage.join(path, ENCODER_FOLDER))
    except OSError as error:
        raise EngineLoadError(f"{path}: expected a checkpoint folder, found: {error}") from error
    if "config.json" not in found:
        raise EngineLoadError(f"{path}: expected a checkpoint folder with a config.json, found none")
    names = (*found, *(f"{ENCODER_FOLDER}/{name}" for name in encoders))
    return [
        name
        for name in names
        if name in _PINNED_NAMES or _ENCODER.fullmatch(name) or name.endswith((WEIGHTS, f"{WEIGHTS}.index.json"))
    ]


def compute_checkpoint_revision(path: str) -> str:
    """The digest that pins a checkpoint: SHA-256 (hex) over names, sizes and contents of `list_checkpoint_files`.

    They are hashed whole, except that of a `*.safetensors` above 64 MiB only its size, its header (names, types and
    shapes of the tensors) and 64 blocks of 64 KiB, evenly spread from the first byte of data to the last, are hashed.
    Another training step changes nearly every weight and is seen; a few bytes changed by hand between two blocks are
    not.

    Raises:
        EngineLoadError: there is no `config.json`, or a file cannot be read or is damaged.
    """
    total = hashlib.sha256()
    for name in list_checkpoint_files(path):
        size, digest = _digest_file(storage.join(path, name))
        total.update(f"{name}\0{size}\0{digest}\n".encode())
    return total.hexdigest()


def _digest_file(file: str) -> tuple[int, str]:
    try:
        with storage.open_input(file) as source:
            size = source.seek(0, 2)
            source.seek(0)
            if size <= MAX_WHOLE_BYTES or not file.endswith(WEIGHTS):
                return size, _digest_whole(source, size)
            return size, _digest_samples(source, size, file)
    except OSError as error:
        raise EngineLoadError(f"{file}: expected a readable file, found: {error}") from error


def _digest_whole(source: BinaryIO, num_bytes: int) -> str:
    digest = hashlib.sha256()
    # A device has no size, and no end.
    while num_bytes > 0 and (block := source.read(min(num_bytes, 1024 * 1024))):
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest()


def _digest_samples(source: BinaryIO, size: int, file: str) -> str:
    """Digest of a safetensors header and of blocks spread evenly over the data."""
    digest = hashlib.sha256(read_weights_header(source, size, file))
    first = source.tell()
    last = max(first, size - NUM_BLOCK_BYTES)
    for block in range(NUM_SAMPLED_BLOCKS):
        source.seek(first + (last - first) * block // (NUM_SAMPLED_BLOCKS - 1))
        digest.update(source.read(NUM_BLOCK_BYTES))
    return digest.hexdigest()
