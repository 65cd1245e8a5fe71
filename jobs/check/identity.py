"""What makes two runs the same job: everything that shapes answers or their cost, and nothing else.

Kept in `_moebeam/job.json`. An output folder belongs to one job; running the same job again continues or ends at once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.chat_options import ChatOptions, options_json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import OutputError
from moebeam.schemas.job.model import CheckpointSection, ModelSection
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import TABLES_VERSION
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.read.input_scan import InputScan

INPUT_FILES = "input files"
"""The part that names the input's files and what changes when they do."""

_FREE_SECTIONS = ("limits", "failures")
_FREE_KEYS = (
    ("output", "max_reject_share"),
    ("model", "device"),
    ("model", "batch_size"),
    ("model", "max_cache_bytes"),
    ("model", "base_url"),
    ("model", "api_key_variable"),
    ("model", "max_concurrency"),
    ("model", "timeout_s"),
    ("model", "max_retries"),
    ("model", "mode"),
    ("model", "fallbacks"),
    ("model", "accelerator"),
    ("model", "min_ram"),
)
"""Keys of a job that are no part of its identity."""


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

    def check_output(self, layout: RunLayout, changed_files: Callable[[], str] = str) -> None:
        """Make sure that the output folder is free, or this job's.

        Args:
            changed_files: says which input files changed, where they did.
        Raises:
            OutputError: another job's, with what differs; or a folder that holds something else.
        """
        try:
            if not storage.exists(layout.job):
                if not storage.is_folder(layout.output) or _is_free(layout):
                    return
                # Another launcher of this job may have claimed the folder since.
                if not storage.exists(layout.job):
                    raise OutputError(
                        f"[output] path {layout.output!r}: expected an empty folder or one of this job, "
                        "found files that are not a moebeam run"
                    )
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
            different = [f"{name}{changed_files()}" if name == INPUT_FILES else name for name in changed]
            raise OutputError(
                f"[output] path {layout.output!r} belongs to another job; different: {', '.join(different)}. {advice}"
            )

    def claim_output(self, layout: RunLayout, kept: Mapping[str, Json]) -> None:
        """Write the identity into the output folder; of two jobs that start at once only one can.

        Args:
            kept: what else the folder keeps of the job; the last attempt's stays.
        Raises:
            OutputError: the folder cannot be written, or another job has just claimed it.
        """
        content = json.dumps({"fingerprint": self.fingerprint, "parts": dict(self.parts), **kept}, indent=2).encode()
        try:
            storage.check_exclusive(layout.state)
            is_ours = storage.create_exclusive(layout.job, content)
            if not is_ours:
                self.check_output(layout)
                # Ours by its identity, so nobody but attempts of this job writes it.
                storage.write_whole(layout.job, content)
        except OSError as error:
            raise OutputError(f"[output] path {layout.output!r}: cannot be written: {error}") from error


def why_not_resumable(place: Sequence[str]) -> str | None:
    """Why a run that has begun cannot go on with another value of a key; None if it can."""
    if place[0] in _FREE_SECTIONS or tuple(place) in _FREE_KEYS:
        return None
    free = ", ".join([*(f"{name}.*" for name in _FREE_SECTIONS), *(".".join(key) for key in _FREE_KEYS)])
    return f"shapes answers, so a run that has begun cannot change it; free are {free}"


def _is_free(layout: RunLayout) -> bool:
    """Whether a folder holds no more than the quote of the run to come and what claims of it have begun to write."""
    begun = storage.spelled(layout.quote), storage.spelled(layout.job)
    state = storage.spelled(layout.state)
    return all(
        path in begun or (path.rpartition("/")[0] == state and storage.is_passing(path))
        for path, _ in storage.list_files(layout.output)
    )


def identify(
    job: Job,
    *,
    scan: InputScan,
    limit: int | None,
    schema: AnswerSchema | None,
    engine: EngineConfig,
    prices: PriceBook | None,
    options: ChatOptions,
    retry_of: Json = None,
    reuse: Json = None,
) -> JobIdentity:
    """The identity of a checked job.

    Args:
        retry_of: which rejects of which run it answers again, if so.
        reuse: the run whose answers it takes over, if so.
    """
    columns = {**job.input.model_dump(mode="json", exclude={"path"}), "format": scan.format}
    script = engine.options.extra_files.get("script")
    model: dict[str, Json] = {
        "engine": engine.engine,
        "name": engine.name,
        "revision": engine.revision,
        "dtype": _dtype(engine.options),
        "encoding": engine.options.encoding,
        "script": script and fingerprint(storage.read_bytes(script).hex()),
    }
    if isinstance(engine.options, OpenAIOptions):
        # Its endpoint may change, and so may who stands in for it: each row says who answered.
        model["provider"] = engine.options.provider
    accounting: dict[str, Json] = {
        "price_book": prices.version if prices else None,
        "provider": job.accounting.provider,
        "model": job.accounting.model,
        "tag_columns": list(job.accounting.tag_columns),
    }
    parts: dict[str, Json] = {
        INPUT_FILES: scan.fingerprint,
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
    if retry_of is not None:
        parts["retry of"] = retry_of
    if reuse is not None:
        parts["--reuse"] = reuse
    return JobIdentity({name: fingerprint(part) for name, part in parts.items()})


def _dtype(options: ModelSection) -> str:
    """What identities of all versions say of the type of weights; engines without weights have one here too."""
    if isinstance(options, CheckpointSection):
        return options.dtype
    return "auto" if options.is_remote else "float32"
