"""The bound: the same render, tokenize, validate and Parquet write in one plain loop, and nothing else.

No identity, plan, sorting, accounting or commit; no engine either, the answer is there. Batches have the size that
*read* gives, so that the tokenizer has as many prompts to spread over the cores.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.pipeline.prompts import ANSWER, NUM_ANSWER_TOKENS, SYSTEM, TEMPLATE, BenchmarkFiles
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.chat_options import DEFAULT_OPTIONS
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.output_column import output_column
from moebeam.schemas.contract.output_type import output_type
from moebeam.schemas.errors import RowError
from moebeam.schemas.job.sections import PromptSection
from moebeam.schemas.tables import OUTPUT, RESULT_SCHEMA, result_schema
from moebeam.transforms.read.input_rows import MAX_BATCH_ROWS
from moebeam.transforms.render.prompt_template import PromptTemplate


def run(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """Write one Parquet file of results; the rows in it."""
    template = PromptTemplate(PromptSection(system=SYSTEM, template=TEMPLATE))
    encoder = PromptEncoder.load(checkpoint)
    schema = AnswerSchema.load(str(files.answer_schema))
    typed = output_type(schema.document)
    assert typed is not None
    output.mkdir(parents=True)
    num_rows = 0
    with (
        pq.ParquetFile(files.prompts) as source,
        pq.ParquetWriter(output / "results.parquet", result_schema([], typed.arrow), compression="zstd") as sink,
    ):
        for batch in source.iter_batches(MAX_BATCH_ROWS, use_threads=False):
            prompts = render_rows(template, encoder, batch.to_pylist())
            lengths = [int(token_ids.shape[0]) for token_ids in encoder.encode_batch(prompts)]
            answers = [ANSWER] * len(prompts)
            values = output_column([schema.check(answer) for answer in answers], typed).array
            table = results_table(answers, lengths, num_rows, str(files.prompts))
            sink.write_table(table.append_column(OUTPUT, values))
            num_rows += len(answers)
    return num_rows


def render_rows(template: PromptTemplate, encoder: PromptEncoder, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prompts of rows that all can be rendered."""
    written = [messages for messages in template.render_batch(rows) if not isinstance(messages, RowError)]
    rendered = encoder.render_batch([(messages, DEFAULT_OPTIONS) for messages in written])
    prompts = [prompt for prompt in rendered if not isinstance(prompt, RowError)]
    assert len(prompts) == len(rows), "every row of the benchmark is an ordinary one"
    return prompts


def results_table(answers: list[str], num_prompt_tokens: list[int], first_row: int, source_file: str) -> pa.Table:
    """A batch of results with every column of `RESULT_SCHEMA`; what only accounting knows is null."""
    size = len(answers)
    repeated: dict[str, Any] = {
        "status": "ok",
        "finish_reason": "stop",
        "attempts": 1,
        "provider": "fake",
        "model": "benchmark",
        "model_revision": "none",
        "cached_tokens": 0,
        "completion_tokens": NUM_ANSWER_TOKENS,
        "reasoning_tokens": 0,
        "latency_ms": 0.0,
        "run_id": "plain",
        "source_file": source_file,
        "scope": "row",
        "num_rows": 1,
    }
    own: dict[str, list[Any]] = {
        "custom_id": [f"{source_file}:{first_row + row}" for row in range(size)],
        "output_text": answers,
        "output_json": answers,
        "prompt_tokens": num_prompt_tokens,
        "computed_tokens": num_prompt_tokens,
        "source_row": list(range(first_row, first_row + size)),
    }
    columns = [
        pa.array(own.get(field.name) or [repeated.get(field.name)] * size, field.type) for field in RESULT_SCHEMA
    ]
    return pa.table(columns, schema=RESULT_SCHEMA)
