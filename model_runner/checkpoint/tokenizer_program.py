"""The part of `fenced_tokenizer.py` that runs behind the fence: reads a tokenizer and encodes texts with it."""

from collections.abc import Callable

import tokenizers

from moebeam.schemas.errors import EngineLoadError

PROBE_ENTRY = "moebeam.model_runner.checkpoint.tokenizer_program:compile_probe"


def compile_probe(content: bytes) -> Callable[[str], str]:
    """What encodes a text, and returns an empty one.

    Raises:
        EngineLoadError: this is no tokenizer.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust extension raises bare Exception
        raise EngineLoadError(f"expected a Hugging Face `tokenizers` file, found: {error}") from error

    def probe(text: str) -> str:
        try:
            tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # as above
            raise EngineLoadError(f"expected a tokenizer that encodes any text, found: {error}") from error
        return ""

    return probe
