"""Picks the `ChatEncoding` of a checkpoint, by name or by its files: how to render chats and parse answers.

*render* asks it for a prompt, engines hand it the text of an answer. A checkpoint with a chat template uses that.
DeepSeek's checkpoints without one ship their authors' encoder as a Python file, whose name tells the family. The file
is never run: `effort.py` reads a few of its literals.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, cast, get_args

from moebeam.model_runner.checkpoint.files import read_json_object
from moebeam.model_runner.encoding.chat.answers import ParsedAnswer
from moebeam.model_runner.encoding.chat.call_formats import CallFormat
from moebeam.model_runner.encoding.chat.token_marks import TokenMarks
from moebeam.model_runner.encoding.chat_template import SETTINGS_FILE, TEMPLATE_FILE, ChatTemplate
from moebeam.model_runner.encoding.deepseek.deepseek_v3_2 import DeepSeekV32
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.model_runner.encoding.deepseek.deepseek_v4_1 import DeepSeekV41
from moebeam.model_runner.encoding.deepseek.effort import V4_1_RELEASE, V4_RELEASE, read_v4_1_efforts, read_v4_efforts
from moebeam.schemas.chat_options import ChatOptions, Tool
from moebeam.schemas.errors import EngineLoadError, RowError
from moebeam.schemas.records import Message, ToolCall
from moebeam.schemas.store import storage

__all__ = ["ChatEncoding", "EncodingName", "ParsedAnswer", "load_encoding"]

EncodingName: TypeAlias = Literal["auto", "chat_template", "deepseek_v3_2", "deepseek_v4", "deepseek_v4_1"]

ENCODING_NAMES: tuple[EncodingName, ...] = get_args(EncodingName)


class ChatEncoding(Protocol):
    """Renders prompts and parses answers of one model family; pure text, immutable.

    Attributes:
        name: of the family.
        markup: texts of tokenizer tokens that a decoder of answers must keep, although the tokenizer may call them
            special: `parse` looks for them.
        has_reasoning: whether the model knows `<think>`.
        call_format: how the model writes calls, for parsers and grammars; None if it writes none.
    """

    @property
    def name(self) -> str: ...
    @property
    def markup(self) -> frozenset[str]: ...
    @property
    def has_reasoning(self) -> bool: ...
    @property
    def call_format(self) -> CallFormat | None: ...

    def is_thinking(self, options: ChatOptions) -> bool:
        """Whether a prompt with these options opens the model's thinking."""
        ...

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """The whole prompt, ready to be answered, its first token included.

        Where data spells one of the tokenizer's tokens the prompt holds `token_marks.MARK`; see there.

        Raises:
            InvalidMessages: names the message and the field, expected and found.
            InvalidTools: the same for the tools of a message.
        """
        ...

    def render_batch(self, chats: Sequence[tuple[Sequence[Message], ChatOptions]]) -> list[str | RowError]:
        """As `render`, for many chats; an error, `TemplateBudgetExceeded` among them, stands in a prompt's place."""
        ...

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them after its content.

        Raises:
            InvalidMessages: a name or arguments that cannot be written.
        """
        ...

    def parse(
        self,
        text: str,
        *,
        starts_in_reasoning: bool,
        has_tools: bool,
        tools: Sequence[Tool] = (),
        is_cut: bool = False,
    ) -> ParsedAnswer:
        """Splits an answer into reasoning, content and calls; never raises, never loses a character.

        Args:
            text: the answer, markup included.
            starts_in_reasoning: see `starts_in_reasoning`.
            has_tools: False leaves the markup of calls in the content.
            tools: those that could be called, where they are known: their schemas tell how a malformed value is meant.
            is_cut: the answer ended for want of tokens, so that nothing at its end is certain.
        """
        ...

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        """Whether a prompt with this ending leaves the model inside `<think>`."""
        ...


def load_encoding(path: str, name: str = "auto", *, token_texts: Iterable[str] = ()) -> ChatEncoding:
    """Loads the encoding of a checkpoint.

    Args:
        path: folder of the checkpoint, local or on an object store.
        name: a family, or `auto`: the chat template if there is one, else the family of the authors' encoder file.
        token_texts: the added tokens of the tokenizer, which data must not spell.
    Raises:
        EngineLoadError: an unknown name, nothing to go by (says what was looked for), or a damaged file.
    """
    marks = TokenMarks(token_texts)
    if name not in ENCODING_NAMES:
        raise EngineLoadError(f"encoding: expected one of {', '.join(ENCODING_NAMES)}, found {name!r}")
    if name == "auto":
        return _recognise(path, marks)
    if name == ChatTemplate.name:
        return ChatTemplate.load(path, read_json_object(path, SETTINGS_FILE), marks)
    family = _FAMILIES[cast("EncodingName", name)]
    found = _list_encoder_files(path, family)
    return family.load(path, found[0] if found else None, marks)


def _recognise(path: str, marks: TokenMarks) -> ChatEncoding:
    settings = read_json_object(path, SETTINGS_FILE)
    if settings.get("chat_template") is not None or storage.exists(storage.join(path, TEMPLATE_FILE)):
        return ChatTemplate.load(path, settings, marks)
    found = {
        name: (family, files[0]) for name, family in _FAMILIES.items() if (files := _list_encoder_files(path, family))
    }
    if len(found) > 1:
        files = ", ".join(file for _, file in found.values())
        raise EngineLoadError(f"{path}: expected the encoder of one model, found {files}: name the encoding in the job")
    for family, file in found.values():
        return family.load(path, file, marks)
    wanted = ", ".join(family.places[0] for family in _FAMILIES.values())
    raise EngineLoadError(
        f"{path}: expected a chat template ({TEMPLATE_FILE}, or `chat_template` in {SETTINGS_FILE}) or the encoder of "
        f"its authors ({wanted}), found none. How this model wants its chats laid out is not guessed: put the template "
        f"that its authors describe into {TEMPLATE_FILE}, or name the encoding in the job"
    )


@dataclass(frozen=True, slots=True)
class _Family:
    """A family with an encoder of its own.

    Attributes:
        file: the name that its authors give their encoder.
        load: from the folder, the place of the encoder file if there is one, and the tokens that data must not spell.
    """

    file: str
    load: Callable[[str, str | None, TokenMarks], ChatEncoding]

    @property
    def places(self) -> tuple[str, str]:
        return f"encoding/{self.file}", self.file


def _list_encoder_files(path: str, family: _Family) -> list[str]:
    return [file for file in family.places if storage.exists(storage.join(path, file))]


def _load_v3_2(path: str, file: str | None, marks: TokenMarks) -> ChatEncoding:
    return DeepSeekV32(marks)


def _load_v4(path: str, file: str | None, marks: TokenMarks) -> ChatEncoding:
    return DeepSeekV4(V4_RELEASE if file is None else read_v4_efforts(path, file), marks)


def _load_v4_1(path: str, file: str | None, marks: TokenMarks) -> ChatEncoding:
    return DeepSeekV41(V4_1_RELEASE if file is None else read_v4_1_efforts(path, file), marks)


_FAMILIES: dict[EncodingName, _Family] = {
    "deepseek_v3_2": _Family("encoding_dsv32.py", _load_v3_2),
    "deepseek_v4": _Family("encoding_dsv4.py", _load_v4),
    "deepseek_v4_1": _Family("encoding_dsv41.py", _load_v4_1),
}
