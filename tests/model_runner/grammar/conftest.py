"""The tokenizers that constraints are tried with."""

from collections.abc import Iterator

import pytest
import tokenizers

from tests.support.models.checkpoints import save_tiny_tokenizer
from tests.support.models.tongues import DEMO_TOKENIZER, END, Tongue


@pytest.fixture(scope="module")
def demo() -> Iterator[Tongue]:
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO_TOKENIZER))
    tongue = Tongue(tokenizer, tokenizer.token_to_id(END))
    yield tongue
    tongue.filler.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tongue]:
    """A byte a token, end of sequence `<|eos|>`."""
    tokenizer = save_tiny_tokenizer(tmp_path_factory.mktemp("tiny")).backend_tokenizer
    tongue = Tongue(tokenizer, tokenizer.token_to_id("<|eos|>"))
    yield tongue
    tongue.filler.close()


@pytest.fixture(scope="module", params=["demo", "tiny"])
def tongue(request: pytest.FixtureRequest) -> Tongue:
    return request.getfixturevalue(request.param)
