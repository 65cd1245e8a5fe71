"""The identity of a job: everything that affects answers or their cost, and nothing else.

Stored in `_moebeam/job.json`. An output folder belongs to one job; running that job again resumes it, or returns at
once if it is complete.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moebeam.jobs.output.run_record import RunRequest
from moebeam.jobs.output.run_state import find_run_id
from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.vllm_engine.adapters import compute_adapter_revision
from moebeam.model_runner.vllm_engine.options import VllmOptions
from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.chat_options import options_json
from moebeam.schemas.errors import OutputError
from moebeam.schemas.job.model import CheckpointSection, ModelSection
from moebeam.schemas.job.sections import Job
from moebeam.schemas.providers import name_provider
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_json import seal_json, unseal_json
from moebeam.schemas.tables import TABLES_VERSION
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.read.input_scan import InputScan
from moebeam.transforms.render.answer_terms import TermsCache

INPUT_FILES = "input files"
"""The part that covers the input files and their change markers."""

_FREE_SECTIONS = ("limits", "failures")
_FREE_KEYS = (
    ("output", "max_reject_share"),
    ("output", "table"),
    ("output", "replace_where"),
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
"""Keys of a job that are not part of its identity."""


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """Digests of the parts of a job, by name; equal digests mean the same job."""

    parts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return fingerprint(dict(self.parts))

    @property
    def run_id(self) -> str:
        """The run's id in every table; the same for every attempt, runner and output folder."""
        return self.fingerprint[:16]

    def check_output(self, layout: RunLayout, changed_files: Callable[[], str] = str) -> None:
        """Check that the output folder is free or belongs to this job.

        Args:
            changed_files: describes the input files that changed.
        Raises:
            OutputError: the folder belongs to another job (says what differs) or has other content.
        """
        try:
            if not storage.exists(layout.job):
                if not storage.is_folder(layout.output) or is_free(layout):
                    return
                # Another launcher of this job may have claimed the folder meanwhile.
                if not storage.exists(layout.job):
                    raise OutputError(
                        f"[output] path {layout.output!r}: expected an empty folder or one of this job, "
                        "found files that are not a moebeam run"
                    )
            content = storage.read_bytes(layout.job)
            found = json.loads(unseal_json(content))["parts"]
        except (ValueError, KeyError, TypeError) as error:
            if find_run_id(layout) == self.run_id:
                return  # the record is damaged, others say that the run is of this job, and `claim_output` follows
            raise OutputError(
                f"{layout.job}: expected the identity of a run, found a damaged file: {error}; moebeam run JOB.toml, "
                "with the job of this run, writes it again"
            ) from error
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

    def claim_output(self, layout: RunLayout, kept: Mapping[str, Json]) -> str:
        """Write the identity into the output folder; of two jobs that start at once, only one succeeds.

        Args:
            kept: further contents of `job.json`; the last attempt's stay.
        Returns:
            The run's key, which its first attempt draws: random numbers without a seed follow it, so that a run goes on
            as it began and another one, of the same job, differs.
        Raises:
            OutputError: the folder cannot be written, or another job has just claimed it.
        """
        run_key = secrets.token_hex(16)
        values = {"fingerprint": self.fingerprint, "parts": dict(self.parts), **kept}
        try:
            storage.check_exclusive(layout.state)
            if storage.create_exclusive(layout.job, _encode_job({**values, "run_key": run_key})):
                return run_key
            self.check_output(layout)
            # The identity is ours, so only attempts of this job write the file.
            run_key = run_key if (kept_key := _read_run_key(layout)) is None else kept_key
            storage.write_whole(layout.job, _encode_job({**values, "run_key": run_key}))
        except OSError as error:
            raise OutputError(f"[output] path {layout.output!r}: cannot be written: {error}") from error
        return run_key


def _encode_job(values: Mapping[str, Json]) -> bytes:
    return seal_json(json.dumps(values, indent=2).encode())


def _read_run_key(layout: RunLayout) -> str | None:
    """The key that an earlier attempt drew; empty in runs of older versions, None where the record is damaged."""
    with contextlib.suppress(ValueError):
        return str(json.loads(unseal_json(storage.read_bytes(layout.job))).get("run_key", ""))
    return None


def why_not_resumable(place: Sequence[str]) -> str | None:
    """Why a started run cannot continue with another value of a key; None if it can."""
    if place[0] in _FREE_SECTIONS or tuple(place) in _FREE_KEYS:
        return None
    free = ", ".join([*(f"{name}.*" for name in _FREE_SECTIONS), *(".".join(key) for key in _FREE_KEYS)])
    return f"shapes answers, so a run that has begun cannot change it; free are {free}"


def is_free(layout: RunLayout) -> bool:
    """Whether a folder holds at most a saved quote, data frames to answer, and unfinished claims."""
    begun = storage.normalize_path(layout.quote), storage.normalize_path(layout.job)
    state, frames = storage.normalize_path(layout.state), storage.normalize_path(layout.frames)
    return all(
        path in begun
        or path.startswith(f"{frames}/")
        or (path.rpartition("/")[0] == state and storage.is_passing(path))
        for path, _ in storage.list_files(layout.output)
    )


def identify(
    request: RunRequest, *, scan: InputScan, engine: EngineConfig, terms: TermsCache, prices: PriceBook | None
) -> JobIdentity:
    """Compute the identity of a checked job."""
    job, schema = request.job, terms.schema
    columns = {**_input(job), "format": scan.format}
    script = engine.options.extra_files.get("script")
    model: dict[str, Json] = {
        "engine": engine.engine,
        "name": engine.name,
        "revision": engine.revision,
        "dtype": _dtype(engine.options),
        "encoding": engine.options.encoding,
        "script": script and fingerprint(storage.read_bytes(script).hex()),
    }
    if isinstance(engine.options, VllmOptions) and engine.options.adapters:
        model["adapters"] = {name: compute_adapter_revision(path) for name, path in engine.options.adapters.items()}
        model["adapter"] = engine.options.adapter
    if isinstance(engine.options, OpenAIOptions):
        # Its endpoint and fallbacks may change: each row says who answered.
        provider = engine.options.provider
        model["provider"] = provider and name_provider(provider)
        if engine.options.routes:
            # Which rows are answered at all.
            model["routes"] = sorted(engine.options.route_names)
    accounting: dict[str, Json] = {
        "price_book": prices.version if prices else None,
        "provider": job.accounting.provider,
        "model": job.accounting.model,
        "tag_columns": list(job.accounting.tag_columns),
    }
    parts: dict[str, Json] = {
        INPUT_FILES: scan.fingerprint,
        "[input]": columns,
        "--limit": request.limit,
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
        "[thinking] and [tools]": {"options": options_json(terms.options), "column": job.tools.column},
        "[repair]": job.repair.model_dump(mode="json"),
        "[sampling]": _sampling(job),
        "[plan]": job.plan.model_dump(mode="json"),
        "[accounting]": accounting,
        "tables version": TABLES_VERSION,
    }
    if request.retry_of is not None:
        parts["retry of"] = request.retry_of.identity
    if request.reuse is not None:
        parts["--reuse"] = request.reuse.run_id
    return JobIdentity({name: fingerprint(part) for name, part in parts.items()})


_LATER_SAMPLING: Mapping[str, Json] = {"top_logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0, "n": 1}


_LATER_INPUT: Mapping[str, object] = {"query": None, "types": {}, "delimiter": None, "tenant": "", "cost_center": ""}


def _input(job: Job) -> dict[str, Json]:
    """`[input]` without its files as identities of all versions record it, as `_sampling` does."""
    section = job.input
    unset = {name for name, value in _LATER_INPUT.items() if getattr(section, name) == value}
    return section.model_dump(mode="json", exclude={"path", *unset})


def _sampling(job: Job) -> dict[str, Json]:
    """`[sampling]` as identities of all versions record it: keys that came later only where they are set."""
    section = job.sampling
    unset = {name for name, value in _LATER_SAMPLING.items() if getattr(section, name) == value}
    return section.model_dump(mode="json", exclude=unset)


def _dtype(options: ModelSection) -> str:
    """The weight dtype as identities of all versions record it; engines without weights have one too."""
    if isinstance(options, CheckpointSection):
        return options.dtype
    return "auto" if options.is_remote else "float32"
