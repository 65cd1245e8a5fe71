"""Which encoding a checkpoint gets, and that the encoder of its authors is read and never run."""

import json
from pathlib import Path

import pytest

from moebeam.model_runner.encoding.chat_encoding import load_encoding
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.errors import EngineLoadError, InvalidMessages
from moebeam.schemas.records import Message

CHAT = [Message("user", "q")]
RELEASE = 'REASONING_EFFORT_MAX = (\n    "Think "\n    "hard.\\n"\n)\n'
LATER = (
    'from typing import Dict\nREASONING_EFFORT_PROMPTS: Dict[str, str] = {"low": "", "high": "H.", "max": "M."}\n'
    'DEFAULT_REASONING_EFFORT = "low"\n'
)
NUMBERS = (
    'REASONING_EFFORT_TEMPLATE = "Effort {budget}. "\nREASONING_EFFORT_MAPPINGS = {"low": 10, "high": 20}\n'
    'DEFAULT_REASONING_EFFORT = "high"\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def put(folder: Path, file: str, source: str = RELEASE) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(source)


def prompt(folder: Path, effort: str | None = None, name: str = "auto") -> str:
    return load_encoding(str(folder), name).render(CHAT, ChatOptions(reasoning_effort=effort))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("encoding/encoding_dsv4.py", "deepseek_v4"),
        ("encoding_dsv4.py", "deepseek_v4"),
        ("encoding/encoding_dsv32.py", "deepseek_v3_2"),
        ("encoding/encoding_dsv41.py", "deepseek_v4_1"),
    ],
)
def test_family_is_known_by_the_name_of_its_encoder(folder: Path, file: str, name: str) -> None:
    put(folder, file, "")
    assert load_encoding(str(folder)).name == name


def test_chat_template_comes_first(folder: Path) -> None:
    put(folder, "encoding/encoding_dsv4.py")
    (folder / "chat_template.jinja").write_text("T")
    assert prompt(folder) == "T"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "S"}))
    assert prompt(folder) == "S"
    assert load_encoding(str(folder), "deepseek_v4").name == "deepseek_v4"


def test_nothing_to_go_by_is_refused_with_what_was_looked_for(folder: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"chat_template\.jinja.*encoding/encoding_dsv4\.py.*not guessed"):
        load_encoding(str(folder))


def test_encoders_of_two_families_are_refused(folder: Path) -> None:
    put(folder, "encoding/encoding_dsv4.py")
    put(folder, "encoding_dsv41.py")
    with pytest.raises(EngineLoadError, match=r"dsv4\.py.*dsv41\.py|dsv41\.py.*dsv4\.py"):
        load_encoding(str(folder))
    assert load_encoding(str(folder), "deepseek_v4").name == "deepseek_v4"


def test_unknown_name_is_refused(folder: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"expected one of auto, chat_template, deepseek_v3_2.*'v5'"):
        load_encoding(str(folder), "v5")


def test_encoding_forced_without_a_file_has_the_releases_efforts(folder: Path) -> None:
    assert "Absolute maximum with no shortcuts" in prompt(folder, "max", "deepseek_v4")
    assert "Reasoning Effort: 100 (range" in prompt(folder, "max", "deepseek_v4_1")


def test_efforts_are_those_of_the_checkpoints_own_encoder(folder: Path) -> None:
    put(folder, "encoding/encoding_dsv4.py", RELEASE)
    assert "<｜begin▁of▁sentence｜>Think hard.\n" in prompt(folder, "max")  # noqa: RUF001 - the token's bars
    assert "Think" in prompt(folder, "xhigh")
    assert "Think" not in prompt(folder, "high") + prompt(folder, "medium") + prompt(folder)
    put(folder, "encoding/encoding_dsv4.py", LATER)
    assert ["H." in prompt(folder, name) for name in (None, "low", "high", "medium")] == [False, False, True, True]
    assert "M." in prompt(folder, "max")
    assert "M." in prompt(folder, "ultra")


def test_numbers_are_those_of_the_checkpoints_own_encoder(folder: Path) -> None:
    put(folder, "encoding/encoding_dsv41.py", NUMBERS)
    assert [prompt(folder, effort).count(f"Effort {number}. ") for effort, number in ((None, 20), ("low", 10))] == [
        1,
        1,
    ]
    assert "Effort 33. " in prompt(folder, "33")
    with pytest.raises(InvalidMessages, match=r"low, high.*'max'"):
        prompt(folder, "max")


def test_encoder_that_names_no_effort_refuses_them_all(folder: Path) -> None:
    put(folder, "encoding/encoding_dsv4.py", "X = 1\n")
    assert prompt(folder)
    with pytest.raises(InvalidMessages, match="it knows none"):
        prompt(folder, "max")


def test_encoder_is_never_run(folder: Path) -> None:
    put(folder, "encoding/encoding_dsv4.py", f"open({str(folder / 'ran')!r}, 'w')\nimport missing\n{RELEASE}")
    assert "Think" in prompt(folder, "max")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def", "expected the Python source"),
        ("\0", "expected the Python source"),
        ("(" * 5000, "expected the Python source"),
        ("REASONING_EFFORT_MAX = open('x')", "REASONING_EFFORT_MAX: expected a literal"),
        ("REASONING_EFFORT_MAX = 7", "REASONING_EFFORT_MAX: expected str, found 7"),
        ("REASONING_EFFORT_PROMPTS = ['a']", "REASONING_EFFORT_PROMPTS: expected str by name"),
        ("REASONING_EFFORT_PROMPTS = {'a': 1}", "REASONING_EFFORT_PROMPTS: expected str by name"),
        ("REASONING_EFFORT_PROMPTS = {'a': ''}\nDEFAULT_REASONING_EFFORT = 'b'", "DEFAULT_REASONING_EFFORT: expected"),
        ("REASONING_EFFORT_PROMPTS = {'a': ''}\nDEFAULT_REASONING_EFFORT = []", "DEFAULT_REASONING_EFFORT: expected"),
    ],
)
def test_damaged_encoder_is_named(folder: Path, source: str, found: str) -> None:
    put(folder, "encoding/encoding_dsv4.py", source)
    with pytest.raises(EngineLoadError, match=rf"encoding_dsv4\.py: {found}"):
        load_encoding(str(folder))
