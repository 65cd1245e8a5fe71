"""Options that rows of batch files bring: followed by their engine, or rejected with its name."""

import json
from typing import Any

import pyarrow as pa
import pytest

from moebeam.model_runner.prefix_tree import common_prefix_lengths
from moebeam.schemas.chat_options import ChatOptions, parse_options_json
from moebeam.schemas.job.model import ModelSection, load_options
from moebeam.schemas.job.sections import PromptSection, SamplingSection
from moebeam.schemas.records import Sampling, parse_sampling_json
from moebeam.schemas.tables import plan_schema, read_schema
from moebeam.transforms.read.batch_lines import parse_batch_line
from moebeam.transforms.read.input_rows import JSONL_INPUT_FIELDS
from moebeam.transforms.render import samples
from moebeam.transforms.render.answer_terms import TermsCache
from moebeam.transforms.render.render_rows import Renderer, RenderSpec

MESSAGES = [{"role": "user", "content": "Which of the colours of the rainbow is the warmest one?"}]


def engine_of(engine: str, **options: Any) -> ModelSection:
    return load_options(engine).model_validate({"engine": engine, "name": "m", **options})


def rendered(engine: ModelSection, *bodies: dict[str, Any], job: Any = (), sampling: Any = ()) -> list[dict[str, Any]]:
    """The planned rows of batch lines with these bodies."""
    spec = RenderSpec(
        prompt=PromptSection(),
        sampling=SamplingSection(**dict({"max_tokens": 16}, **dict(sampling))),
        checkpoint="",
        passthrough=(),
        messages_column="messages",
        sampling_column="sampling",
        options_column="options",
        terms=TermsCache(ChatOptions(**dict(job)), None),
        model="m",
        engine=engine,
    )
    rows = []
    for number, body in enumerate(bodies):
        line = {"custom_id": str(number), "url": "/v1/chat/completions", "body": {"messages": MESSAGES, **body}}
        request = parse_batch_line(json.dumps(line).encode())
        values = {field.name: getattr(request, field.name) for field in JSONL_INPUT_FIELDS}
        place = {"custom_id": str(number), "scope": "row", "num_rows": 1, "tenant": "", "passthrough": {}}
        rows.append({**place, "input": values})
    batch = pa.RecordBatch.from_pylist(rows, schema=read_schema(JSONL_INPUT_FIELDS, []))
    return [row for planned in Renderer(spec).render_rows(batch) for row in planned.to_pylist()]


def rejection(engine: ModelSection, body: dict[str, Any], **job: Any) -> tuple[str, str] | None:
    (row,) = rendered(engine, body, **job)
    return row["error_type"] and (row["error_type"], row["error_message"])


OPENAI = engine_of("openai")
DEEPSEEK = engine_of("openai", provider="deepseek")


@pytest.mark.parametrize(
    ("engine", "body", "words"),
    [
        (
            "torch",
            {"service_tier": "flex"},
            "service_tier: the engine 'torch' cannot follow it, found 'flex'; openai can",
        ),
        ("torch", {"logprobs": True, "top_logprobs": 3}, "top_logprobs: the engine 'torch' cannot follow it, found 3"),
        ("transformers", {"logprobs": True}, "logprobs: the engine 'transformers' cannot follow it"),
        ("vllm", {"service_tier": "priority"}, "service_tier: the engine 'vllm' cannot follow it"),
    ],
)
def test_what_an_engine_cannot_follow_is_a_reject_that_names_it(engine: str, body: dict[str, Any], words: str) -> None:
    found = rejection(engine_of(engine), body)
    assert found is not None
    assert found[0] == "unsupported_request"
    assert found[1].startswith(words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"service_tier": "flex"}, "service_tier: the provider 'deepseek' cannot follow it, found 'flex'"),
        ({"seed": 7, "temperature": 1}, "seed: the provider 'deepseek' cannot follow it, found 7"),
        ({"max_reasoning_tokens": 9}, "max_reasoning_tokens: the provider 'deepseek' cannot follow it, found 9"),
    ],
)
def test_what_a_provider_cannot_follow_is_a_reject_that_names_it(body: dict[str, Any], words: str) -> None:
    assert rejection(DEEPSEEK, body) == ("unsupported_request", words)


@pytest.mark.parametrize(
    ("engine", "body"),
    [
        (OPENAI, {"service_tier": "flex"}),
        (OPENAI, {"logprobs": True, "top_logprobs": 5, "frequency_penalty": 1, "presence_penalty": -1}),
        (DEEPSEEK, {"service_tier": "default"}),
        (DEEPSEEK, {"seed": 7, "temperature": 0}),
        (engine_of("torch"), {"service_tier": "auto", "frequency_penalty": 0.5, "presence_penalty": 0.5}),
        (engine_of("transformers"), {"frequency_penalty": 0.5, "logprobs": False}),
        (engine_of("vllm"), {"logprobs": True, "top_logprobs": 5, "frequency_penalty": 1}),
    ],
)
def test_what_can_be_followed_is_planned(engine: ModelSection, body: dict[str, Any]) -> None:
    assert rejection(engine, body) is None


def test_values_of_the_row_win_over_those_of_the_job() -> None:
    own, plain = rendered(
        OPENAI,
        {"service_tier": "flex", "presence_penalty": 0},
        {},
        job={"service_tier": "priority"},
        sampling={"presence_penalty": 1.5, "frequency_penalty": 0.5},
    )
    assert parse_options_json(own["options"]).service_tier == "flex"
    assert plain["options"] is None
    assert parse_sampling_json(own["sampling"]) == Sampling(16, frequency_penalty=0.5)
    assert parse_sampling_json(plain["sampling"]) == Sampling(16, frequency_penalty=0.5, presence_penalty=1.5)


def test_a_row_is_planned_once_for_each_answer_that_it_wants() -> None:
    hot = {"temperature": 1}
    rows = rendered(OPENAI, {"n": 3}, {}, {"n": 1}, {"n": 2, "tools": "none"}, sampling={"n": 2, **hot})
    assert [(row["custom_id"], row["sample"]) for row in rows] == [
        *(("0", sample) for sample in range(3)),
        *(("1", sample) for sample in range(2)),
        ("2", 0),
        ("3", 0),
    ]
    assert [row["error_type"] for row in rows] == [*[None] * 6, "invalid_tools"]
    assert len({(row["prefix_key"], row["sampling"], row["num_prompt_tokens"]) for row in rows[:-1]}) == 1


@pytest.mark.parametrize("num_bytes", [1, 2000, 1 << 20])
def test_samples_of_a_row_are_planned_side_by_side_in_batches_of_bounded_size(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_REPEATED_BYTES", num_bytes)
    counts = [1, 4, 2, 1, 3, 3]
    batch = pa.RecordBatch.from_pylist(
        [{"custom_id": str(row), "messages": "m" * 200, "sample": 0} for row in range(6)], schema=plan_schema([])
    )
    found = list(samples.repeat_rows(batch, counts))
    rows = [(row["custom_id"], row["sample"]) for each in found for row in each.to_pylist()]
    assert rows == [(str(row), sample) for row, count in enumerate(counts) for sample in range(count)]
    for each in found:
        ids = each.column("custom_id").to_pylist()
        assert each.column("sample")[0].as_py() == 0, "a batch begins with a row"
        assert each.nbytes <= 2 * num_bytes or len({*ids}) == 1
    assert len(found) == {1: 6, 1 << 20: 1}.get(num_bytes, len(found))


def test_likely_tokens_need_log_probabilities() -> None:
    found = rejection(OPENAI, {"top_logprobs": 2})
    assert found == ("invalid_sampling", "top_logprobs: expected `logprobs` beside it, found 2 without")
    assert rejection(OPENAI, {"logprobs": False}, sampling={"logprobs": True, "top_logprobs": 2}) is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"service_tier": "scale"}, "service_tier: expected one of auto, default, flex, priority, found 'scale'"),
        ({"model": "gpt-9"}, "body.model: expected 'm' or 'b', found 'gpt-9'; [model] name names the job's model"),
        ({"model": 7}, "body.model: expected 'm' or 'b', found 7"),
    ],
)
def test_other_words_are_refused_with_those_that_are_known(body: dict[str, Any], words: str) -> None:
    found = rejection(engine_of("openai", routes=[{"name": "b"}]), body)
    assert found is not None
    assert found[1].startswith(words)


def test_a_route_is_a_model_of_its_own() -> None:
    engine = engine_of("openai", routes=[{"name": "b"}, {"name": "c"}])
    own, named, routed, other = rendered(engine, {}, {"model": "m"}, {"model": "b"}, {"model": "c"})
    assert own["options"] is None
    assert named["options"] is None
    assert parse_options_json(routed["options"]).model == "b"
    assert own["prefix_key"] == named["prefix_key"]
    keys = sorted({row["prefix_key"] for row in (own, routed, other)})
    assert len(keys) == 3
    assert common_prefix_lengths(keys).tolist() == [0, 0, 0]


def test_an_engine_without_routes_answers_for_its_own_model_alone() -> None:
    found = rejection(engine_of("torch"), {"model": "gpt-4o"})
    assert found is not None
    assert found[1].startswith("body.model: expected 'm', found 'gpt-4o'")
    assert rejection(engine_of("torch"), {"model": "m"}) is None


def test_a_route_is_judged_by_its_own_provider() -> None:
    engine = engine_of("openai", provider="deepseek", routes=[{"name": "b", "provider": "openai"}])
    assert rejection(engine, {"model": "b", "service_tier": "flex"}) is None
    assert rejection(engine, {"model": "m", "service_tier": "flex"}) is not None
