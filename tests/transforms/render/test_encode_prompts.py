"""Encoding the prompts of a batch: a huge prompt and one that the tokenizer gives up on are errors of their own."""

import json
import shutil
from pathlib import Path

import pytest

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.encoding import prompt_encoder
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.encoding.remote_prompts import RemotePrompts
from moebeam.schemas.errors import ContextOverflow, InvalidMessages
from moebeam.transforms.render.encode_prompts import encode_prompts, find_huge


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder.load(str(CHECKPOINT_PATH))


def test_a_prompt_far_beyond_the_context_is_told_without_encoding_it(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_encoder, "_PIECE_CHARACTERS", 1_000)
    encoded: list[int] = []
    encode = PromptEncoder.encode_batch

    def watch(self: PromptEncoder, prompts: list[str]) -> object:
        encoded.extend(map(len, prompts))
        return encode(self, prompts)

    monkeypatch.setattr(PromptEncoder, "encode_batch", watch)
    found = find_huge(encoder, "word " * 200_000, 500)
    assert isinstance(found, ContextOverflow)
    assert str(found).endswith("found a prompt of 1,000,000 characters with more tokens than that")
    assert sum(encoded) < 10_000


def test_a_long_prompt_that_may_fit_is_encoded(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_encoder, "_PIECE_CHARACTERS", 1_000)
    text = "word " * 2_000
    (token_ids,) = encoder.encode_batch([text])
    assert find_huge(encoder, text, len(token_ids)) is None
    assert find_huge(encoder, text, len(token_ids) // 2) is not None
    assert find_huge(RemotePrompts("m"), text, 1) is None


def test_prompts_are_the_same_in_batches_of_any_size(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {index} " * index for index in range(20)]
    whole = [token_ids.tolist() for token_ids in encoder.encode_batch(texts)]
    monkeypatch.setattr(prompt_encoder, "_BATCH_CHARACTERS", 50)
    assert [token_ids.tolist() for token_ids in encoder.encode_batch(texts)] == whole


def test_a_prompt_on_which_the_tokenizer_panics_is_an_error_beside_the_others(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT_PATH, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "((a+)+)+!|."}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": split}))
    encoder = PromptEncoder.load(str(tmp_path / "checkpoint"))
    first, second, third = encode_prompts(encoder, ["one", "a" * 40, "two"])
    assert isinstance(second, InvalidMessages)
    assert "expected text that the tokenizer encodes" in str(second)
    assert not isinstance(first, InvalidMessages)
    assert not isinstance(third, InvalidMessages)
