"""Turns rows as read into planned rows: chat messages, the model's own prompt, token ids.

The pure part of *render*, free of Beam, so that a quote renders rows exactly as a run does. A row that cannot be
rendered, or does not fit the model's context, becomes a reject that states the numbers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, Literal, TypeAlias, cast

import pyarrow as pa
from pydantic import ValidationError

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.encoding.remote_prompts import Encoder, RemotePrompts, load_encoder
from moebeam.model_runner.encoding.schema_in_prompt import with_schema_in_prompt
from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.schemas.arrow import list_values
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions, ResponseFormat, options_json, with_own_values
from moebeam.schemas.column_values import python_values
from moebeam.schemas.errors import (
    ContextOverflow,
    InvalidSampling,
    InvalidTools,
    InvalidValue,
    RowError,
    UnsupportedRequest,
    abbreviate,
)
from moebeam.schemas.job.model import ModelSection
from moebeam.schemas.job.sections import PromptSection, SamplingSection
from moebeam.schemas.records import Message, Sampling, TokenIds, sampling_json
from moebeam.schemas.redaction.hide import hide_in_message
from moebeam.schemas.tables import INPUT, plan_schema
from moebeam.transforms.render.answer_terms import TermsCache
from moebeam.transforms.render.chat_messages import messages_json, parse_messages
from moebeam.transforms.render.encode_prompts import encode_prompts, find_huge
from moebeam.transforms.render.prompt_template import Messages, PromptTemplate
from moebeam.transforms.render.samples import repeat_rows

SchemaInPrompt: TypeAlias = Literal["auto", "always", "never"]


_DEFAULT_SAMPLING: dict[str, Any] = {name: key.default for name, key in SamplingSection.model_fields.items()}


@dataclass(frozen=True, slots=True)
class RenderSpec:
    """How rows are rendered; small and picklable, since the tokenizer is loaded in `setup`.

    Attributes:
        checkpoint: folder of the tokenizer; empty for a remote model whose tokenizer is not available.
        terms: the job's own; `options_column` holds what rows say instead, `tools_column` their tools.
        model: the job's, which a row may name.
        engine: says which options it can follow, and which other models rows may name.
    """

    prompt: PromptSection
    sampling: SamplingSection
    checkpoint: str
    passthrough: tuple["pa.Field[Any]", ...]
    messages_column: str | None
    sampling_column: str | None = None
    encoding: str = "auto"
    terms: TermsCache = field(default_factory=lambda: TermsCache(DEFAULT_OPTIONS, None))
    options_column: str | None = None
    tools_column: str | None = None
    schema_in_prompt: SchemaInPrompt = "auto"
    model: str = ""
    engine: ModelSection = field(default_factory=ModelSection)


@dataclass(slots=True)
class _Rendered:
    """Columns of a batch under construction; one entry per row."""

    keys: list[bytes | None] = field(default_factory=list[bytes | None])
    num_tokens: list[int | None] = field(default_factory=list[int | None])
    messages: list[str | None] = field(default_factory=list[str | None])
    sampling: list[str | None] = field(default_factory=list[str | None])
    options: list[str | None] = field(default_factory=list[str | None])
    errors: list[RowError | None] = field(default_factory=list[RowError | None])
    num_samples: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class _Chat:
    """A row's request before its prompt is laid out; `written` are its own options, and `options` all that hold."""

    messages: Sequence[Message]
    options: ChatOptions
    sampling: Sampling
    written: str | None
    model: str | None
    num_samples: int


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    messages: str
    sampling: Sampling
    options: str | None
    model: str | None = None
    num_samples: int = 1


class Renderer:
    """The pure part of *render*, with its tokenizer and templates loaded."""

    def __init__(self, spec: RenderSpec) -> None:
        self._spec = spec
        self._template = PromptTemplate(spec.prompt)
        self._encoder = load_encoder(spec.checkpoint, spec.encoding, spec.model, spec.engine.max_model_len)
        self._routes = {
            name: RemotePrompts.of_model(name) if spec.engine.is_remote else self._encoder
            for name in spec.engine.route_names
        }
        self._schema = plan_schema(spec.passthrough)
        self._job_sampling = spec.sampling.of_one_answer

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together; None if unknown."""
        return self._encoder.context_length

    @property
    def is_estimated(self) -> bool:
        """Whether token counts are estimates, for lack of the model's tokenizer."""
        return self._encoder.is_estimated

    def render_rows(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Render every row of a batch, each into as many planned rows as it wants answers, in the order of the rows.

        Rejects, those of *read* among them, are one row each.
        """
        tenants = list_values(batch, "tenant")
        is_rejected = [error is not None for error in list_values(batch, "error_type")]
        rows = [None if rejected else row for row, rejected in zip(_read_input_rows(batch), is_rejected, strict=True)]
        chats = [self._read_chat(row, chat) for row, chat in self._write_messages(rows)]
        prompts = [self._refuse_huge(prompt) for prompt in self._lay_out(chats)]
        token_ids = encode_prompts(self._encoder, [prompt.text for prompt in prompts if isinstance(prompt, _Prompt)])
        rendered = _Rendered()
        for prompt, tenant in zip(prompts, tenants, strict=True):
            self._append(rendered, prompt, tenant, token_ids)
        yield from repeat_rows(self._with_columns(batch, rendered), rendered.num_samples)

    def _write_messages(self, rows: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Each row with the messages that the templates make of it; None in place of a chat that it brings itself.

        All rows at once, because templates run in another process.
        """
        is_templated = [self._spec.messages_column is None and isinstance(row, Mapping) for row in rows]
        written = iter(self._template.render_batch(list(compress(rows, is_templated))))
        for row, templated in zip(rows, is_templated, strict=True):
            yield row, next(written) if templated else None

    def _lay_out(self, chats: "Sequence[_Chat | RowError | None]") -> "list[_Prompt | RowError | None]":
        """The prompts of chats, those of the same batch at once; errors stay where they are."""
        asked = [chat for chat in chats if isinstance(chat, _Chat)]
        pairs = [(chat.messages, chat.options) for chat in asked]
        texts = iter(render_prompts(self._encoder, pairs, self._spec.schema_in_prompt))
        return [_make_prompt(chat, next(texts)) if isinstance(chat, _Chat) else chat for chat in chats]

    def _read_chat(self, row: Any, written: "Messages | RowError | None") -> "_Chat | RowError | None":
        if row is None or isinstance(row, RowError):
            return row
        if isinstance(written, RowError):
            return written
        try:
            messages = parse_messages(_drop_nulls(row[self._spec.messages_column])) if written is None else written
            own = self._read_own_options(row)
            options = with_own_values(self._spec.terms.options, own)
            sampling, num_samples = self._merge_sampling(row, options.model)
            self._refuse_options(own, options)
            own_json = options_json(options) if own else None
            terms = self._spec.terms.find(own_json)
            return _Chat(messages, terms.options, sampling, own_json, options.model, num_samples)
        except RowError as error:
            return error

    def _read_own_options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a row brings itself; the job's model counts as none.

        Raises:
            UnsupportedRequest: it asks for a model that the job does not have.
        """
        spec = self._spec
        own: dict[str, Any] = {}
        if spec.options_column is not None and (text := row[spec.options_column]):
            own = json.loads(text)
        if spec.tools_column is not None and (tools := parse_tools(row[spec.tools_column], spec.tools_column)):
            own["tools"] = tools
        allowed = (spec.model, *spec.engine.route_names)
        if own.get("model") == spec.model:
            del own["model"]
        elif own.get("model") is not None and own["model"] not in allowed:
            raise UnsupportedRequest(
                f"body.model: expected {' or '.join(map(repr, allowed))}, found {abbreviate(own['model'])}; "
                "[model] name names the job's model, [[model.routes]] of the engine openai and [model.adapters] of the "
                "engine vllm others"
            )
        return own

    def _refuse_options(self, own: Mapping[str, Any], options: ChatOptions) -> None:
        """Check a row's own options against its engine, and its tools against its choice.

        Raises:
            UnsupportedRequest, InvalidTools: what cannot be followed.
        """
        for name in own:
            refusal = self._spec.engine.find_refusal(name, getattr(options, name), options.model)
            if refusal is not None:
                raise UnsupportedRequest(refusal)
        if options.tool_choice.mode in ("required", "named") and not options.callable_tools:
            raise InvalidTools(
                f"tools: expected some to choose from (tool_choice {options.tool_choice.mode}), found none"
            )

    def _merge_sampling(self, row: Mapping[str, Any], model: str | None) -> tuple[Sampling, int]:
        """A row's own sampling over the job's, and how many answers it wants.

        Raises:
            InvalidSampling: a value is out of range, or needs another.
            UnsupportedRequest: the engine cannot follow it.
        """
        text = row[self._spec.sampling_column] if self._spec.sampling_column is not None else None
        if not text or text == "{}":
            return self._job_sampling, self._spec.sampling.n
        own: dict[str, Any] = json.loads(text)
        engine = self._spec.engine
        if own.get("logprobs") is False:
            own.setdefault("top_logprobs", 0)
        try:
            merged = SamplingSection.model_validate({**self._spec.sampling.model_dump(), **own})
        except ValidationError as error:
            raise _explain_sampling(error) from error
        sampling = merged.of_one_answer
        for name in own:
            value = getattr(merged, name)
            # A greedy answer is repeatable without a seed.
            is_void = value == _DEFAULT_SAMPLING[name] or (name == "seed" and sampling.is_greedy)
            if not is_void and (refusal := engine.find_refusal(name, value, model)) is not None:
                raise UnsupportedRequest(refusal)
        return sampling, merged.n

    def _append(
        self,
        rendered: _Rendered,
        prompt: "_Prompt | RowError | None",
        tenant: str,
        token_ids: Iterator[TokenIds | RowError],
    ) -> None:
        key = num_tokens = error = messages = sampling = options = None
        tokens = next(token_ids) if isinstance(prompt, _Prompt) else prompt
        if tokens is None or isinstance(tokens, RowError):
            error = tokens
        elif isinstance(prompt, _Prompt):
            num_tokens = int(tokens.shape[0])
            error = self._overflow(num_tokens, prompt.sampling, prompt.model)
            if error is None:
                # Another model's cache is another tenant's: nothing is shared with it.
                cache = tenant if prompt.model is None else f"{tenant}\0{prompt.model}"
                key = prefix_key(cache, tokens, are_words=self._encoder.is_estimated)
                messages, sampling, options = prompt.messages, sampling_json(prompt.sampling), prompt.options
        rendered.keys.append(key)
        rendered.num_tokens.append(num_tokens)
        rendered.messages.append(messages)
        rendered.sampling.append(sampling)
        rendered.options.append(options)
        rendered.errors.append(error)
        rendered.num_samples.append(prompt.num_samples if isinstance(prompt, _Prompt) and error is None else 1)

    def _refuse_huge(self, prompt: "_Prompt | RowError | None") -> "_Prompt | RowError | None":
        if not isinstance(prompt, _Prompt):
            return prompt
        limits = self._encoder if prompt.model is None else self._routes[prompt.model]
        return find_huge(self._encoder, prompt.text, limits.context_length) or prompt

    def _overflow(self, num_tokens: int, sampling: Sampling, model: str | None) -> ContextOverflow | None:
        # The limits of a route are its own; its tokens are counted as the job's.
        encoder = self._encoder if model is None else self._routes[model]
        if encoder.fits(num_tokens, sampling.max_tokens):
            return None
        about = "about " if encoder.is_estimated else ""
        return ContextOverflow(
            f"expected prompt and output within the model's context of {encoder.context_length} tokens, "
            f"found {about}{num_tokens} prompt tokens + max_tokens {sampling.max_tokens} "
            f"= {num_tokens + sampling.max_tokens}"
        )

    def _with_columns(self, batch: pa.RecordBatch, rendered: _Rendered) -> pa.RecordBatch:
        columns: dict[str, pa.Array[Any]] = {name: batch.column(name) for name in batch.schema.names}
        columns["prefix_key"] = pa.array(rendered.keys, pa.large_binary())
        columns["num_prompt_tokens"] = pa.array(rendered.num_tokens, pa.int32())
        columns["messages"] = pa.array(rendered.messages, pa.large_string())
        columns["sampling"] = pa.array(rendered.sampling, pa.string())
        columns["options"] = pa.array(rendered.options, pa.string())
        columns["merged_into"] = pa.nulls(batch.num_rows, pa.string())
        columns["sample"] = pa.array([0] * batch.num_rows, pa.int32())
        if any(rendered.errors):
            for name, values in _error_columns(rendered.errors).items():
                merged = [
                    new if new is not None else old for new, old in zip(values, columns[name].to_pylist(), strict=True)
                ]
                columns[name] = pa.array(merged, pa.string())
        return pa.RecordBatch.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)


def _explain_sampling(error: ValidationError) -> InvalidSampling:
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return InvalidSampling(str(first.get("ctx", {}).get("error", first["msg"])))
    where = ".".join(str(part) for part in first["loc"])
    return InvalidSampling(f"{where}: {first['msg']}, found {first['input']!r}")


def _make_prompt(chat: _Chat, text: str | RowError) -> _Prompt | RowError:
    if isinstance(text, RowError):
        return text
    try:
        messages = messages_json(chat.messages)
        return _Prompt(text, messages, chat.sampling, chat.written, chat.model, chat.num_samples)
    except RowError as error:
        return error


def render_prompts(
    encoder: Encoder, chats: Sequence[tuple[Sequence[Message], ChatOptions]], schema_in_prompt: SchemaInPrompt
) -> list[str | RowError]:
    """Render chats as the model's own prompts, with or without the schema of their answer.

    An error, `InvalidMessages` for example, says that the encoding cannot express that chat.
    """
    has_no_place = has_no_place_for_schemas(encoder)
    return encoder.render_batch([_place_schema(*chat, schema_in_prompt, has_no_place) for chat in chats])


def _place_schema(
    messages: Sequence[Message], options: ChatOptions, schema_in_prompt: SchemaInPrompt, has_no_place: bool
) -> tuple[Sequence[Message], ChatOptions]:
    if options.response_format.type == "json_schema":
        if schema_in_prompt == "never":
            options = replace(options, response_format=ResponseFormat())
        elif schema_in_prompt == "always" and has_no_place:
            messages = with_schema_in_prompt(messages, options.response_format.schema)
    return messages, options


def has_no_place_for_schemas(encoder: Encoder) -> bool:
    """Whether a schema for the model to read must go into a message."""
    return isinstance(encoder, PromptEncoder) and encoder.encoding.name == "chat_template"


def parse_tools(value: object, column: str) -> Json:
    """A row's tools as a list of JSON objects, from JSON text or structs.

    Raises:
        InvalidTools: text that is not JSON.
    """
    if not isinstance(value, str):
        return cast("Json", _drop_nulls(value))
    try:
        return cast("Json", json.loads(value))
    except (ValueError, RecursionError) as error:
        raise InvalidTools(f"{column}: expected a JSON list of tools, found text that is not JSON: {error}") from error


def _drop_nulls(value: object) -> object:
    """Drop null fields: a column's structs have every field of any row, null where a row does not set it."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return {key: _drop_nulls(item) for key, item in items if item is not None}
    return [_drop_nulls(item) for item in cast("list[object]", value)] if isinstance(value, list) else value


def _read_input_rows(batch: pa.RecordBatch) -> "list[dict[str, Any] | InvalidValue]":
    """Input columns of each row, or why Python cannot hold one of them."""
    struct: Any = batch.column(INPUT)
    names = struct.type.names
    columns = [python_values(column, name) for column, name in zip(struct.flatten(), names, strict=True)]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    rows = rows or [{} for _ in range(batch.num_rows)]
    return [next((value for value in row.values() if isinstance(value, InvalidValue)), row) for row in rows]


def _error_columns(errors: list[RowError | None]) -> dict[str, list[str | None]]:
    return {
        "error_stage": [error and error.error_stage for error in errors],
        "error_type": [error and error.error_type for error in errors],
        "error_message": [error and hide_in_message(str(error)) for error in errors],
    }
