"""What makes two runs the same job: everything that shapes answers or their cost, and nothing else.

Kept in `_moebeam/job.json`. An output folder belongs to one job; running the same job again continues or ends at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from model_runner.protocol import EngineConfig
from schemas import storage
from schemas.answer_schema import AnswerSchema
from schemas.canonical import Json, fingerprint
from schemas.chat_options import ChatOptions, options_json
from schemas.errors import OutputError
from schemas.job import Job
from schemas.layout import RunLayout
from schemas.tables import TABLES_VERSION
from transforms.input_scan import InputScan
from transforms.price_book import PriceBook


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """Digests of the parts of a job, by name; two runs are one job if all are equal."""

    parts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return fingerprint(dict(self.parts))

    @property
    def run_id(self) -> str:
        """The run's name in every table: the same for every attempt, runner and output folder."""
        return self.fingerprint[:16]

    def check_output(self, layout: RunLayout) -> None:
        """Make sure that the output folder is free, or this job's.

        Raises:
            OutputError: another job's, with what differs; or a folder that holds something else.
        """
        try:
            if not storage.exists(layout.job):
                if storage.is_folder(layout.output) and storage.holds_anything(layout.output):
                    raise OutputError(
                        f"[output] path {layout.output!r}: expected an empty folder or one of this job, "
                        "found files that are not a moebeam run"
                    )
                return
            found = json.loads(storage.read_bytes(layout.job))["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{layout.job}: expected the identity of a run, found: {error}") from error
        except OSError as error:
            raise OutputError(f"[output] path {layout.output!r}: cannot be looked at: {error}") from error
        changed = sorted(name for name in {*found, *self.parts} if found.get(name) != self.parts.get(name))
        if changed:
            advice = "Choose another output path, or restore what changed"
            if changed == ["--limit"]:
                advice = "A trial needs an output of its own: add --set output.path=…"
            raise OutputError(
                f"[output] path {layout.output!r} belongs to another job; different: {', '.join(changed)}. {advice}"
            )

    def claim_output(self, layout: RunLayout) -> None:
        """Write the identity into the output folder; of two jobs that start at once only one can.

        Raises:
            OutputError: the folder cannot be written, or another job has just claimed it.
        """
        content = json.dumps({"fingerprint": self.fingerprint, "parts": dict(self.parts)}, indent=2)
        try:
            storage.check_exclusive(layout.state)
            is_ours = storage.create_exclusive(layout.job, content.encode())
        except OSError as error:
            raise OutputError(f"[output] path {layout.output!r}: cannot be written: {error}") from error
        if not is_ours:
            self.check_output(layout)


def identify(
    job: Job,
    *,
    scan: InputScan,
    limit: int | None,
    schema: AnswerSchema | None,
    engine: EngineConfig,
    prices: PriceBook | None,
    options: ChatOptions,
) -> JobIdentity:
    """The identity of a checked job."""
    columns = {**job.input.model_dump(mode="json", exclude={"path"}), "format": scan.format}
    model: dict[str, Json] = {
        "engine": engine.engine,
        "name": engine.name,
        "revision": engine.revision,
        "dtype": engine.dtype,
        "encoding": engine.encoding,
        "script": fingerprint(storage.read_bytes(engine.script).hex()) if engine.script is not None else None,
    }
    accounting: dict[str, Json] = {
        "price_book": prices.version if prices else None,
        "provider": job.accounting.provider,
        "model": job.accounting.model,
    }
    parts: dict[str, Json] = {
        "input files": scan.fingerprint,
        "[input]": columns,
        "--limit": limit,
        "[prompt]": job.prompt.model_dump(mode="json"),
        "[output] schema": {
            "document": schema.document,
            "formats": schema.formats,
            "source": schema.source if schema.model else None,
            "code": schema.code_digest,
        }
        if schema
        else None,
        "[model]": model,
        "[output] form": job.output.model_dump(
            mode="json", include={"response_format", "schema_in_prompt", "constrain"}
        ),
        "[thinking] and [tools]": {"options": options_json(options), "column": job.tools.column},
        "[repair]": job.repair.model_dump(mode="json"),
        "[sampling]": job.sampling.model_dump(mode="json"),
        "[plan]": job.plan.model_dump(mode="json"),
        "[accounting]": accounting,
        "tables version": TABLES_VERSION,
    }
    return JobIdentity({name: fingerprint(part) for name, part in parts.items()})
