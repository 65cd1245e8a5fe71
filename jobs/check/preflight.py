"""Everything that can be checked before the pipeline starts, and what is learnt by checking.

`check_job` looks at files, columns, templates, schema, checkpoint, prices and output, and says all that is wrong at
once. Nothing is written.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moebeam.jobs.check.answer_contract import answer_options, answer_schema, answer_terms, answer_type, terms_warnings
from moebeam.jobs.check.disk import check_disk
from moebeam.jobs.check.engine_config import check_engine, engine_warnings, price_line
from moebeam.jobs.check.identity import JobIdentity, identify
from moebeam.jobs.check.input_columns import check_writable, column_problems, columns_to_read, needed_columns
from moebeam.jobs.console.summary import CheckReport
from moebeam.jobs.output.run_record import RetryOf, changed_files, describe_job, kept_scan, refuse_secrets
from moebeam.jobs.run_views import run_views
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.output_type import OutputType, describe_output_type
from moebeam.schemas.errors import JobError, JobFileError, OutputError
from moebeam.schemas.job.sections import Job, PlanSection
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import ReuseSource
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.plan.plan_record import PlanRecord
from moebeam.transforms.read.input_rows import ReadColumns
from moebeam.transforms.read.input_scan import InputScan, scan_input
from moebeam.transforms.render.answer_terms import TermsCache
from moebeam.transforms.render.prompt_template import PromptTemplate
from moebeam.transforms.render.render_rows import RenderSpec

if TYPE_CHECKING:
    from moebeam.pipelines.main_job import MainJob

Checked = TypeVar("Checked")


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A job that can run, with all that was found out on the way."""

    job: Job
    limit: int | None
    layout: RunLayout
    identity: JobIdentity
    scan: InputScan
    columns: ReadColumns
    engine: EngineConfig
    terms: TermsCache
    output_type: OutputType | None
    prices: PriceBook | None
    price_line: PriceLine | None
    warnings: tuple[str, ...] = ()
    retry_of: RetryOf | None = None
    reuse: ReuseSource | None = None

    @property
    def kept(self) -> dict[str, Json]:
        """What the output folder keeps of the job beside its identity."""
        currency = self.price_line.currency if self.price_line is not None else None
        return describe_job(self.job, limit=self.limit, currency=currency, retry_of=self.retry_of, reuse=self.reuse)

    @property
    def render_spec(self) -> RenderSpec:
        """How rows become prompts."""
        is_jsonl = self.scan.format == "jsonl"
        return RenderSpec(
            prompt=self.job.prompt,
            sampling=self.job.sampling,
            checkpoint=self.engine.path,
            passthrough=self.columns.passthrough,
            messages_column="messages" if is_jsonl else self.job.prompt.messages_column,
            sampling_column="sampling" if is_jsonl else None,
            encoding=self.engine.options.encoding,
            terms=self.terms,
            options_column="options" if is_jsonl else None,
            tools_column=self.job.tools.column,
            schema_in_prompt=self.job.output.schema_in_prompt,
            model=self.engine.name,
        )

    @property
    def plan_section(self) -> PlanSection:
        """`[plan]`, as the job's tags change it."""
        return _plan_section(self.job)

    def main_job(self, planned: PlanRecord | None) -> "MainJob":
        """What the pipeline of an attempt that starts now is built from; `planned` is the plan of an earlier one."""
        # Here, because a quote checks the job too, on machines without Beam.
        from moebeam.pipelines.main_job import MainJob
        from moebeam.transforms.answer.answer_shard import AnswerSpec
        from moebeam.transforms.answer.budget import SpendingLimits
        from moebeam.transforms.plan.build_shards import PlanSpec
        from moebeam.transforms.publish.manifest import PublishSpec

        run_id, section = self.identity.run_id, self.job.accounting
        accounting = Accounting(run_id, self.prices, section.provider, section.model, section.tag_columns)
        is_jsonl = self.scan.format == "jsonl"
        passthrough = self.columns.passthrough
        return MainJob(
            scan=self.scan,
            columns=self.columns,
            render=self.render_spec,
            plan=PlanSpec(
                self.plan_section,
                self.layout,
                passthrough,
                group_starts=tuple(group.units[0].ordinal for group in self.scan.groups),
            ),
            answer=AnswerSpec(
                layout=self.layout,
                engine=self.engine,
                terms=self.terms,
                accounting=accounting,
                repair=self.job.repair,
                schema_in_prompt=self.job.output.schema_in_prompt,
                is_constrained=self.job.output.constrain == "auto",
                output_type=self.output_type,
                limits=SpendingLimits.of(self.job.limits, time.time()),
                failures=self.job.failures,
                reuse=self.reuse,
            ),
            publish=PublishSpec(
                run_id,
                self.layout,
                passthrough,
                self.scan.num_rows,
                self._described(),
                self.output_type,
                run_views(),
                accounting,
            ),
            has_ids=is_jsonl or self.job.input.id_column is not None,
            planned=planned,
            resources=self.job.model.resource_hints,
        )

    def report(self) -> CheckReport:
        """What `moebeam validate` prints."""
        warnings = list(self.warnings)
        if self.scan.num_unreadable_files:
            warnings.append(f"{self.scan.num_unreadable_files} of {self.scan.num_files} files cannot be read")
        if self.job.accounting.price_book is None:
            warnings.append("no [accounting] price_book: tokens are counted, costs stay null")
        line = self.price_line
        return CheckReport(
            output=self.layout.output,
            num_files=self.scan.num_files,
            num_rows=self.scan.num_rows,
            limit=self.limit,
            columns=self.scan.names if self.scan.format == "parquet" else (),
            engine=self.engine.engine,
            model=self.engine.name,
            schema=self.job.output.schema_,
            output_type=self.output_type and describe_output_type(self.output_type),
            price=line
            and f"{line.provider} {line.model}: hit {line.cache_hit}, miss {line.cache_miss}, output {line.output} "
            f"{line.currency} per 1,000,000 tokens",
            warnings=tuple(warnings),
        )

    def _described(self) -> dict[str, Json]:
        retry = self.retry_of
        return {
            "product_version": version("moebeam"),
            "job_fingerprint": self.identity.fingerprint,
            "input": {
                "path": self.job.input.path,
                "format": self.scan.format,
                "num_files": self.scan.num_files,
                "num_rows": self.scan.num_rows,
                "fingerprint": self.scan.fingerprint,
                "limit": self.limit,
            },
            "model": {"engine": self.engine.engine, "name": self.engine.name, "revision": self.engine.revision},
            "price_book": self.prices.version if self.prices else None,
            "retry_of": retry and {"output": retry.output, "run_id": retry.run_id, "kinds": list(retry.kinds)},
            "reuse": self.reuse and {"output": self.reuse.output, "run_id": self.reuse.run_id},
            "warnings": list(self.warnings),
        }


def check_job(
    job: Job,
    *,
    limit: int | None = None,
    retry_of: RetryOf | None = None,
    retried: InputScan | None = None,
    reuse: ReuseSource | None = None,
    is_quote: bool = False,
) -> CheckedJob:
    """Check a job against the world.

    Args:
        limit: the trial's.
        retry_of: which rejects of which run are answered again, if so.
        retried: the input that those are, before the output folder keeps it.
        reuse: the run whose answers are taken over, if any.
        is_quote: nothing will be written, so neither output nor disk are looked at, and a price need not hold now.
    Raises:
        JobError: what is wrong, all problems in one message; a subclass of its own where only one is found.
    """
    if limit is not None and limit < 1:
        raise JobFileError(f"--limit: expected at least 1, found {limit}")
    problems: list[JobError] = []
    layout = RunLayout(job.output.path)
    template = _try(problems, lambda: PromptTemplate(job.prompt))
    scan = retried or _try(
        problems,
        lambda: (
            # A run that has its plan keeps no units of its input, which a quote reads again.
            (None if is_quote else kept_scan(layout, job.input, limit, retry_of))
            or scan_input(job.input, limit=limit, needed=needed_columns(job, template))
        ),
    )
    schema = _try(problems, lambda: answer_schema(job))
    options = _try(problems, lambda: answer_options(job, schema))
    terms = _try(problems, lambda: answer_terms(job, options, schema)) if options is not None else None
    output_type = _try(problems, lambda: answer_type(schema))
    engine = _try(problems, lambda: check_engine(job, needs_key=not is_quote))
    prices = _try(problems, lambda: _load_prices(job))
    line = None
    if engine is not None and prices is not None and not is_quote:
        line = _try(problems, lambda: price_line(job, engine.config, prices))
    problems += _limit_problems(job, prices, line)
    problems += refuse_secrets(job)
    if scan is not None and template is not None:
        problems += column_problems(job, scan, template)
    if not is_quote:
        problems += _output_problems(job)
    if problems or scan is None or template is None or engine is None or terms is None:
        raise _one_error(problems)
    columns = columns_to_read(job, scan, template)
    check_writable(columns)
    identity = identify(
        job,
        scan=scan,
        limit=limit,
        schema=schema,
        engine=engine.config,
        prices=prices,
        options=terms.options,
        retry_of=retry_of and retry_of.identity,
        reuse=reuse and reuse.run_id,
    )
    if reuse is not None:
        # Here, as in `main_job`: it reads a run, and so needs Beam.
        from moebeam.jobs.check.reuse import check_reusable

        check_reusable(reuse, identity.parts)
    close = None
    if not is_quote:
        identity.check_output(layout, lambda: changed_files(layout, job.input))
        close = check_disk(job, scan, columns)
    return CheckedJob(
        job=job,
        limit=limit,
        layout=layout,
        identity=identity,
        scan=scan,
        columns=columns,
        engine=engine.config,
        terms=terms,
        output_type=output_type,
        prices=prices,
        price_line=line,
        warnings=(
            *terms_warnings(job, engine, terms),
            *engine_warnings(job, engine.config, prices),
            *([close] if close else ()),
        ),
        retry_of=retry_of,
        reuse=reuse,
    )


def _plan_section(job: Job) -> PlanSection:
    """`[plan]`; rows of different tags are billed apart, so none is merged unless the job says so."""
    if job.accounting.tag_columns and job.plan.merge == "auto":
        return job.plan.model_copy(update={"merge": "never"})
    return job.plan


def _try(problems: list[JobError], check: Callable[[], Checked]) -> Checked | None:
    try:
        return check()
    except JobError as error:
        problems.append(error)
        return None


def _one_error(problems: list[JobError]) -> JobError:
    if len(problems) == 1:
        return problems[0]
    return JobFileError("\n".join(str(problem) for problem in problems))


def _load_prices(job: Job) -> PriceBook | None:
    return PriceBook.load(job.accounting.price_book) if job.accounting.price_book is not None else None


def _limit_problems(job: Job, prices: PriceBook | None, line: PriceLine | None) -> Iterable[JobError]:
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


def _output_problems(job: Job) -> Iterable[JobError]:
    output = job.output.path
    source = job.input.path
    is_glob = any(mark in source for mark in "*?[")
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
