"""Which tokens end an answer: the configuration's, and those that only the tokenizer or the chat template knows."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from moebeam.model_runner.checkpoint.files import read_tokenizer
from moebeam.model_runner.encoding.chat_encoding import load_encoding
from moebeam.model_runner.encoding.end_tokens import read_end_token_ids
from moebeam.schemas.errors import EngineLoadError

TOKENS = {"<end>": 0, "<turn>": 1, "<user>": 2, "x": 3, "</think>": 4}
CHAT = "{% for message in messages %}<user>{{ message.content }}END{% endfor %}"


def read(
    folder: Path, *, end: str = "", config: Any = None, generation: Any = None, eos_token: Any = None
) -> tuple[int, ...]:
    """The end tokens of a checkpoint whose template writes `end` behind each turn."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(TOKENS, unk_token="x"))
    tokenizer.add_special_tokens(["<end>", "<turn>", "<user>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(TOKENS), "eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    settings = {"eos_token": eos_token, "chat_template": CHAT.replace("END", end)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return read_end_token_ids(str(folder), read_tokenizer(str(folder)), load_encoding(str(folder)))


def test_the_configuration_says(tmp_path: Path) -> None:
    assert read(tmp_path, config=1) == (1,)
    assert read(tmp_path, config=[1, 0]) == (1, 0)
    assert read(tmp_path, config=1, generation=[0]) == (0,)
    assert read(tmp_path, config=1, generation=[]) == (1,)


@pytest.mark.parametrize("eos_token", ["<turn>", {"content": "<turn>", "special": True}])
def test_the_tokenizers_end_counts_beside_the_configurations(eos_token: object, tmp_path: Path) -> None:
    assert read(tmp_path, config=0, eos_token=eos_token) == (0, 1)
    assert read(tmp_path, eos_token=eos_token) == (1,)


@pytest.mark.parametrize("end", ["<turn>", " <turn>\\n", "{{ '<turn>' }}"])
def test_what_the_template_writes_behind_an_answer_ends_one(end: str, tmp_path: Path) -> None:
    assert read(tmp_path, config=0, eos_token="<end>", end=end) == (0, 1)


@pytest.mark.parametrize("end", ["", "x", "bye", "{{ raise_exception('no answers') }}"])
def test_a_template_without_an_end_of_its_own_adds_none(end: str, tmp_path: Path) -> None:
    assert read(tmp_path, config=0, end=end) == (0,)


def test_an_end_that_the_tokenizer_does_not_have_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"expected `eos_token_id` in .* or an `eos_token`"):
        read(tmp_path, eos_token="<gone>")


@pytest.mark.parametrize("bad", [5, -1, "1", [1, None], True, 0.0, {}], ids=str)
def test_an_id_that_is_no_token_is_refused(bad: object, tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"config\.json: eos_token_id: expected token ids from 0 to 4, .*found "):
        read(tmp_path, config=bad, eos_token="<end>")
