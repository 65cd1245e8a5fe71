"""All checks before the pipeline starts, and their results.

`check_job` checks files, columns, templates, schema, checkpoint, prices and output, and reports all problems at once.
It writes nothing.
"""

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from moebeam.jobs.check.answer_contract import answer_options, answer_schema, answer_terms, answer_type, terms_warnings
from moebeam.jobs.check.disk import check_disk
from moebeam.jobs.check.engine_config import CheckedEngine, check_engine, engine_warnings, price_line
from moebeam.jobs.check.identity import JobIdentity, identify, is_free
from moebeam.jobs.check.input_columns import check_writable, choose_columns, find_column_problems, list_needed_columns
from moebeam.jobs.check.output_table import check_output_table
from moebeam.jobs.check.pinned_input import pin_input
from moebeam.jobs.check.reuse import check_reusable
from moebeam.jobs.console.summary import CheckReport
from moebeam.jobs.output.run_record import RetryOf, RunRequest, describe_changed_files, find_secrets, read_saved_scan
from moebeam.jobs.prices.shipped import load_named_book
from moebeam.schemas.contract.output_type import OutputType, describe_output_type
from moebeam.schemas.errors import InputPatternError, JobError, JobFileError, OutputError
from moebeam.schemas.job.sections import Job, PlanSection
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import result_schema
from moebeam.transforms.answer.reuse import ReuseSource
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.read.input_rows import ReadColumns
from moebeam.transforms.read.input_scan import InputScan, scan_input
from moebeam.transforms.read.sources.staged_input import keep_staged, scan_staged
from moebeam.transforms.render.answer_terms import TermsCache
from moebeam.transforms.render.prompt_template import PromptTemplate
from moebeam.transforms.render.render_rows import RenderSpec

Checked = TypeVar("Checked")


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A job that can run, with the results of its checks; runs and quotes are built from it.

    Attributes:
        output_type: of the typed column of answers; None without a schema.
        price_line: the current price; None for a quote, and without a price book.
    """

    request: RunRequest
    identity: JobIdentity
    scan: InputScan
    columns: ReadColumns
    engine: CheckedEngine
    terms: TermsCache
    output_type: OutputType | None
    prices: PriceBook | None
    price_line: PriceLine | None
    warnings: tuple[str, ...]

    @property
    def currency(self) -> str | None:
        """Currency of the run's cost."""
        return self.price_line.currency if self.price_line is not None else None

    @property
    def has_ids(self) -> bool:
        """Whether rows bring their own ids, which may repeat."""
        return self.scan.format == "jsonl" or self.request.job.input.id_column is not None

    @property
    def render_spec(self) -> RenderSpec:
        """The settings of *render*."""
        job, engine = self.request.job, self.engine.config
        is_jsonl = self.scan.format == "jsonl"
        return RenderSpec(
            prompt=job.prompt,
            sampling=job.sampling,
            checkpoint=engine.path,
            passthrough=self.columns.output_fields,
            messages_column="messages" if is_jsonl else job.prompt.messages_column,
            sampling_column="sampling" if is_jsonl else None,
            encoding=engine.options.encoding,
            terms=self.terms,
            options_column="options" if is_jsonl else None,
            tools_column=job.tools.column,
            schema_in_prompt=job.output.schema_in_prompt,
            model=engine.name,
            engine=engine.options,
        )

    @property
    def plan_section(self) -> PlanSection:
        """`[plan]`; with tags, identical rows are not merged by default, because tags are billed separately."""
        job = self.request.job
        if job.accounting.tag_columns and job.plan.merge == "auto":
            return job.plan.model_copy(update={"merge": "never"})
        return job.plan

    def claim_output(self) -> str:
        """Write the job into its output folder; of two jobs that start at once, only one succeeds.

        Returns:
            The run's key, see `JobIdentity.claim_output`.
        Raises:
            OutputError: the folder cannot be written, or another job has just claimed it.
        """
        layout = RunLayout(self.request.job.output.path)
        return self.identity.claim_output(layout, self.request.to_json(self.currency))

    def keep_input(self) -> "CheckedJob":
        """Keep rows that a query or a table gave in the output folder, which must be claimed; other input stays.

        Returns:
            The job over the rows that are kept.
        Raises:
            InputChanged: an earlier attempt began with other rows, which are lost.
            OSError: the store failed.
        """
        if self.scan.staged is None:
            return self
        job, layout = self.request.job, RunLayout(self.request.job.output.path)
        keep_staged(layout, self.scan.staged)
        needed = list_needed_columns(job, PromptTemplate(job.prompt))
        return replace(self, scan=scan_staged(job.input, layout, limit=self.request.limit, needed=needed))

    def check_readable(self) -> None:
        """Refuse an input of which no file can be read; a run would only reject its files.

        Raises:
            InputPatternError: names the first file and the reason.
        """
        if self.scan.num_unreadable_files == self.scan.num_files:
            path = self.request.job.input.shown_path
            raise InputPatternError(f"[input] path {path}: {self._describe_unreadable()}")

    def _describe_unreadable(self) -> str:
        scan = self.scan
        first = next(unit for unit in scan.units if unit.error is not None)
        which = f": {first.path}: {first.error}" if first.path else ""
        return f"{scan.num_unreadable_files} of {scan.num_files} files cannot be read{which}"

    def report(self) -> CheckReport:
        """The report of `moebeam validate`."""
        job, scan, line = self.request.job, self.scan, self.price_line
        warnings = list(self.warnings)
        if scan.num_unreadable_files:
            warnings.append(self._describe_unreadable())
        if job.accounting.price_book is None:
            warnings.append("no [accounting] price_book: tokens are counted, costs stay null")
        return CheckReport(
            output=job.output.path,
            num_files=scan.num_files,
            num_rows=scan.num_rows,
            limit=self.request.limit,
            columns=scan.names if scan.format == "parquet" else (),
            engine=self.engine.config.engine,
            model=self.engine.config.name,
            schema=job.output.schema_,
            output_type=self.output_type and describe_output_type(self.output_type),
            price=line
            and f"{line.provider} {line.model}: hit {line.cache_hit}, miss {line.cache_miss}, output {line.output} "
            f"{line.currency} per 1,000,000 tokens",
            warnings=tuple(warnings),
        )


def check_job(
    job: Job,
    *,
    limit: int | None = None,
    retry_of: RetryOf | None = None,
    retried: InputScan | None = None,
    reuse: ReuseSource | None = None,
    is_quote: bool = False,
    is_launch: bool = False,
    parts: "CheckedParts | None" = None,
) -> CheckedJob:
    """Check a job against its input, checkpoint, prices and output.

    Args:
        limit, retry_of, reuse: see `RunRequest`.
        retried: the input of a retry, needed until its output folder holds it.
        is_quote: skip the checks of output and disk; no current price is required.
        is_launch: rows of a query or a table may lie in the output folder from now on, in a scratch folder.
        parts: what was checked before the input was there, perhaps on another machine; None checks it now.
    Raises:
        JobError: all problems in one message; of the specific subclass if there is only one.
    """
    if limit is not None and limit < 1:
        raise JobFileError(f"--limit: expected at least 1, found {limit}")
    problems: list[JobError] = []
    layout = RunLayout(job.output.path)
    job = pin_input(job, layout)
    request = RunRequest(job, limit, retry_of, reuse)
    template = _try(problems, lambda: PromptTemplate(job.prompt))
    scan = retried or _try(
        problems,
        lambda: (
            # A planned run keeps no input units, but a quote reads the input again.
            (None if is_quote else read_saved_scan(layout, request))
            or _scan(request, list_needed_columns(job, template), layout, is_launch=is_launch)
        ),
    )
    parts = parts or _check_parts(job, problems, is_quote=is_quote)
    engine, terms, output_type, prices = parts.engine, parts.terms, parts.output_type, parts.prices
    if scan is not None and template is not None:
        problems += find_column_problems(job, scan, template)
    if not is_quote:
        problems += _find_output_problems(job)
    if problems or scan is None or template is None or engine is None or terms is None:
        raise _join_errors(problems)
    columns = choose_columns(job, scan, template)
    check_writable(columns)
    identity = identify(request, scan=scan, engine=engine.config, terms=terms, prices=prices)
    if reuse is not None:
        check_reusable(reuse, identity.parts)
    disk_warning = None
    table_warnings: tuple[str, ...] = ()
    if not is_quote:
        identity.check_output(layout, lambda: describe_changed_files(layout, job.input))
        disk_warning = check_disk(job, scan, columns)
        results = result_schema(columns.output_fields, output_type and output_type.arrow)
        table_warnings = check_output_table(request, results, identity.run_id)
    return CheckedJob(
        request=request,
        identity=identity,
        scan=scan,
        columns=columns,
        engine=engine,
        terms=terms,
        output_type=output_type,
        prices=prices,
        price_line=parts.price_line,
        warnings=(
            *terms_warnings(job, engine, terms),
            *engine_warnings(job, engine.config, prices),
            *([disk_warning] if disk_warning else ()),
            *table_warnings,
        ),
    )


@dataclass(frozen=True, slots=True)
class CheckedParts:
    """The parts of a job that its input has no say in; a part with a problem is None, as is one that the job lacks."""

    engine: CheckedEngine | None
    terms: TermsCache | None
    output_type: OutputType | None
    prices: PriceBook | None
    price_line: PriceLine | None


def check_parts(job: Job, fields: Collection["pa.Field[Any]"] | None) -> CheckedParts:
    """Check a job before its input is there.

    Args:
        fields: the columns that the rows will have; None where they are not known.
    Raises:
        JobError: all problems in one message; of the specific subclass if there is only one.
    """
    problems: list[JobError] = []
    template = _try(problems, lambda: PromptTemplate(job.prompt))
    parts = _check_parts(job, problems, is_quote=False)
    if fields is not None and template is not None:
        schema = pa.schema(fields)
        scan = InputScan((), schema, tuple(schema.names), "parquet", 1, "")
        problems += find_column_problems(job, scan, template)
    problems += _find_output_problems(job)
    if problems:
        raise _join_errors(problems)
    return parts


def _check_parts(job: Job, problems: list[JobError], *, is_quote: bool) -> CheckedParts:
    schema = _try(problems, lambda: answer_schema(job))
    options = _try(problems, lambda: answer_options(job, schema))
    terms = _try(problems, lambda: answer_terms(job, options, schema)) if options is not None else None
    output_type = _try(problems, lambda: answer_type(schema))
    engine = _try(problems, lambda: check_engine(job, needs_key=not is_quote))
    prices = _try(problems, lambda: _load_prices(job))
    line = None
    if engine is not None and prices is not None and not is_quote:
        line = _try(problems, lambda: price_line(job, engine.config, prices))
    problems += _find_limit_problems(job, prices, line)
    problems += find_secrets(job)
    return CheckedParts(engine, terms, output_type, prices, line)


def _scan(request: RunRequest, needed: Collection[str] | None, layout: RunLayout, *, is_launch: bool) -> InputScan:
    section = request.job.input
    if not section.is_staged:
        return scan_input(section, limit=request.limit, needed=needed)
    is_ours = is_launch and (not storage.exists(layout.output) or storage.exists(layout.job) or is_free(layout))
    scratch = layout.frames if is_ours else None
    return scan_staged(section, layout, limit=request.limit, needed=needed, scratch=scratch)


def _try(problems: list[JobError], check: Callable[[], Checked]) -> Checked | None:
    try:
        return check()
    except JobError as error:
        problems.append(error)
        return None


def _join_errors(problems: list[JobError]) -> JobError:
    if len(problems) == 1:
        return problems[0]
    return JobFileError("\n".join(str(problem) for problem in problems))


def _load_prices(job: Job) -> PriceBook | None:
    return load_named_book(job.accounting.price_book) if job.accounting.price_book is not None else None


def _find_limit_problems(job: Job, prices: PriceBook | None, line: PriceLine | None) -> Iterable[JobError]:
    if job.limits.max_cost is None:
        return
    if job.accounting.price_book is None:
        yield JobFileError("[limits] max_cost: needs [accounting] price_book; without prices nobody knows the cost")
    elif prices is not None and line is not None:
        same = (other for other in prices.lines if (other.provider, other.model) == (line.provider, line.model))
        if len(currencies := sorted({other.currency for other in same})) > 1:
            yield JobFileError(
                f"[limits] max_cost: expected prices of {line.provider} {line.model} in one currency, "
                f"found {', '.join(currencies)}"
            )


def _find_output_problems(job: Job) -> Iterable[JobError]:
    output = job.output.path
    for source in job.input.paths:
        is_glob = any(mark in source for mark in "*?[{")
        folder = (source.partition("**")[0] if is_glob else source).rstrip("/")
        reads_below = not is_glob or "**" in source
        if reads_below and folder and (output.rstrip("/") == folder or output.startswith(folder + "/")):
            yield OutputError(
                f"[output] path {output!r} lies inside the input {source!r}: a later run would read its own results"
            )
    if not storage.is_local(output):
        return
    path = Path(output)
    if path.is_file():
        yield OutputError(f"[output] path {output!r}: expected a folder, found a file")
        return
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield OutputError(f"[output] path {output!r}: {existing} cannot be written")
