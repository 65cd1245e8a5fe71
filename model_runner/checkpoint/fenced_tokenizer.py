"""Tries a checkpoint's tokenizer behind the fence before a job is run with it.

A `tokenizer.json` is a program too: its regular expressions can take hours over a text, its models gigabytes before
there is any. What it does with every row cannot be known, but a tokenizer that is hostile or broken shows it here.
"""

import pickle

from moebeam.model_runner.checkpoint.files import read_checkpoint_file
from moebeam.model_runner.checkpoint.tokenizer_program import PROBE_ENTRY
from moebeam.model_runner.fence.fence import Program
from moebeam.schemas.errors import EngineLoadError, RowError
from moebeam.schemas.store import storage

_MAX_CPU_S = 5.0
"""To read it, and for each text; a tokenizer of 35 MB takes a second."""

_MAX_MEMORY_BYTES = 1536 << 20
_NUM_CHARACTERS = 4_000
_PARTS = ("a", "A", "0", " ", "\n", "-", "a ", "aA0 ", "\u00e9", "\u4e2d")
_PROBES = tuple(part * (_NUM_CHARACTERS // len(part)) + end for part in _PARTS for end in ("", "!\u00e9"))
"""Long runs, and what does not go on as they do: where expressions with repeats in repeats try again and again."""


def try_tokenizer(path: str) -> None:
    """Read a checkpoint's `tokenizer.json` and encode texts with it.

    Raises:
        EngineLoadError: there is none, it is none, or it takes too much time or memory; names the file.
    """
    file = storage.join(path, "tokenizer.json")
    content = pickle.dumps(read_checkpoint_file(path, "tokenizer.json"))
    program = Program(PROBE_ENTRY, content, file, _MAX_CPU_S, None, _MAX_MEMORY_BYTES)
    try:
        for result in (program.run([probe])[0] for probe in _PROBES):
            if isinstance(result, RowError):
                raise EngineLoadError(str(result).replace("for one row", "to read it and to encode a text"))
    except EngineLoadError as error:
        raise EngineLoadError(str(error) if file in str(error) else f"{file}: {error}") from error
