"""Prompts through `RunInference`: `python pipeline.py --rows 4 --output answers`.

Beam options may follow, in Beam's spelling.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from moebeam import MoebeamModelHandler, ReadPrompts, RenderPrompts, load_job
from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.demo.tickets import generate_tickets, make_tickets_table
from moebeam.model_runner.prefix_tree import token_ids_of
from moebeam.schemas.records import Completion, Request, Sampling
from moebeam.transforms.render.chat_messages import parse_messages

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer tickets in a plain Beam pipeline.")
    parser.add_argument("--rows", type=int, default=4, help="tickets to make up")
    parser.add_argument("--output", default="answers", help="prefix of the JSON lines files")
    arguments, beam_args = parser.parse_known_args()

    tickets = HERE / "tickets.parquet"
    pq.write_table(make_tickets_table(generate_tickets(arguments.rows, seed=1, split="held_out")), tickets)
    checked = check_job(load_job(str(HERE / "job.toml")))
    sampling = Sampling(max_tokens=160)

    with beam.Pipeline(options=PipelineOptions(beam_args)) as pipeline:
        rows = pipeline | ReadPrompts(checked.scan, checked.columns) | RenderPrompts(checked.render_spec)
        requests = rows | beam.FlatMap(make_requests, sampling).with_outputs("rejects", main="requests")
        answers = requests.requests | RunInference(KeyedModelHandler(MoebeamModelHandler(checked.engine.config)))
        answers | "FormatAnswers" >> beam.MapTuple(format_answer) | "Write" >> beam.io.WriteToText(arguments.output)
        requests.rejects | "WriteRejects" >> beam.io.WriteToText(f"{arguments.output}.rejects")


def make_requests(batch: pa.RecordBatch, sampling: Sampling) -> Iterator[Any]:
    """One keyed request a row; a row that could not be rendered goes to `rejects`."""
    for row in batch.to_pylist():
        if row["error_type"] is not None:
            yield beam.pvalue.TaggedOutput("rejects", f"{row['custom_id']}: {row['error_message']}")
            continue
        messages = parse_messages(json.loads(row["messages"]))
        yield row["custom_id"], Request(row["custom_id"], token_ids_of(row["prefix_key"]), messages, sampling)


def format_answer(custom_id: str, completion: Completion) -> str:
    """An answer as one JSON line."""
    error = None if completion.error is None else str(completion.error)
    return json.dumps(
        {"custom_id": custom_id, "text": completion.text, "tokens": completion.usage.completion_tokens, "error": error}
    )


if __name__ == "__main__":
    main()
