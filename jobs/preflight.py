"""Everything that can be checked before the pipeline starts, and what is learnt by checking.

`check_job` looks at files, columns, templates, schema, checkpoint, prices and output, and says all that is wrong at
once. Nothing is written.
"""

import difflib
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.disk import check_disk
from jobs.engine_config import engine_config, engine_warnings, price_line, thinks
from jobs.identity import JobIdentity, identify
from jobs.run_record import RetryOf, changed_files, describe_job, kept_scan, refuse_secrets
from jobs.run_views import run_views
from jobs.summary import CheckReport
from model_runner.prompt_encoder import PromptEncoder
from model_runner.protocol import CONSTRAINED_ENGINES, EngineConfig
from model_runner.remote_prompts import load_encoder
from schemas import storage
from schemas.answer_schema import AnswerSchema
from schemas.canonical import Json
from schemas.chat_options import ChatOptions, ResponseFormat, Tool, ToolChoice, parse_tool_choice, parse_tools
from schemas.errors import JobError, JobFileError, OutputError, RowError
from schemas.job import Job, PlanSection
from schemas.layout import RunLayout
from schemas.model_limits import parameter_warnings, strict_tool_problems
from schemas.output_type import OutputType, describe_output_type, output_type
from schemas.prices import PriceLine
from schemas.records import Sampling
from schemas.strict_json import parse_json
from schemas.tables import OUTPUT, RESULT_SCHEMA, result_schema
from transforms.answer_terms import TermsBook
from transforms.grammar_book import GrammarBook
from transforms.input_rows import JSONL_INPUT_FIELDS, ReadColumns
from transforms.input_scan import InputScan, scan_input
from transforms.plan_record import PlanRecord
from transforms.price_book import PriceBook
from transforms.prompt_template import PromptTemplate
from transforms.renderer import RenderSpec
from transforms.reuse import ReuseSource

if TYPE_CHECKING:
    from pipelines.main_job import MainJob

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
    terms: TermsBook
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
            encoding=self.engine.encoding,
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
        from pipelines.main_job import MainJob
        from transforms.answer import AnswerSpec
        from transforms.budget import Limits
        from transforms.plan import PlanSpec
        from transforms.publish import PublishSpec
        from transforms.waste import WasteTerms

        run_id = self.identity.run_id
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
                run_id=run_id,
                layout=self.layout,
                engine=self.engine,
                terms=self.terms,
                prices=self.prices,
                repair=self.job.repair,
                schema_in_prompt=self.job.output.schema_in_prompt,
                is_constrained=self.job.output.constrain == "auto",
                output_type=self.output_type,
                provider=self.job.accounting.provider,
                model=self.job.accounting.model,
                tag_columns=self.job.accounting.tag_columns,
                limits=Limits.of(self.job.limits, time.time()),
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
                WasteTerms(
                    run_id,
                    self.prices,
                    self.job.accounting.provider,
                    self.job.accounting.model,
                    self.job.accounting.tag_columns,
                ),
            ),
            has_ids=is_jsonl or self.job.input.id_column is not None,
            planned=planned,
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
            or scan_input(job.input, limit=limit, needed=_needed(job, template))
        ),
    )
    schema = _try(problems, lambda: _load_schema(job))
    options = _try(problems, lambda: _options_of(job, schema))
    terms = _try(problems, lambda: _terms_of(job, options, schema)) if options is not None else None
    output_type = _try(problems, lambda: _output_type(schema))
    engine = _try(problems, lambda: engine_config(job, needs_key=not is_quote))
    prices = _try(problems, lambda: _load_prices(job))
    line = None
    if engine is not None and prices is not None and not is_quote:
        line = _try(problems, lambda: price_line(job, engine, prices))
    problems += _limit_problems(job, prices, line)
    problems += refuse_secrets(job)
    if scan is not None and template is not None:
        problems += _column_problems(job, scan, template)
    if not is_quote:
        problems += _output_problems(job)
    if problems or scan is None or template is None or engine is None or terms is None:
        raise _one_error(problems)
    columns = _columns(job, scan, template)
    _check_writable(columns)
    identity = identify(
        job,
        scan=scan,
        limit=limit,
        schema=schema,
        engine=engine,
        prices=prices,
        options=terms.options,
        retry_of=retry_of and retry_of.identity,
        reuse=reuse and reuse.run_id,
    )
    if reuse is not None:
        # Here, as in `main_job`: it reads a run, and so needs Beam.
        from jobs.reuse import check_reusable

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
        engine=engine,
        terms=terms,
        output_type=output_type,
        prices=prices,
        price_line=line,
        warnings=(
            *_terms_warnings(job, engine, terms),
            *engine_warnings(job, engine, prices),
            *([close] if close else ()),
        ),
        retry_of=retry_of,
        reuse=reuse,
    )


def _needed(job: Job, template: PromptTemplate | None) -> frozenset[str] | None:
    """Columns that the job reads; None for all of them."""
    if job.input.passthrough == "all" or template is None:
        return None
    single = (
        job.input.id_column,
        job.input.tenant_column,
        job.input.cost_center_column,
        job.prompt.messages_column,
        job.tools.column,
    )
    passed = {*job.input.passthrough, *job.accounting.tag_columns}
    return template.variables | passed | {name for name in single if name is not None} | {"line"}


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


def _load_schema(job: Job) -> AnswerSchema | None:
    section = job.output
    if section.schema_ is None:
        return None
    if section.response_format != "auto":
        raise JobFileError(
            f"[output] response_format: expected `auto` beside `schema`, found {section.response_format!r}"
        )
    return AnswerSchema.load(section.schema_, section.formats, job.folder)


def _options_of(job: Job, schema: AnswerSchema | None) -> ChatOptions:
    """What the job asks of every row that does not say otherwise."""
    section = job.tools
    tools: tuple[Tool, ...] = ()
    if section.path is not None:
        if section.column is not None:
            raise JobFileError("[tools]: expected `path` or `column`, found both")
        tools = _read_tools(section.path)
    response_format = ResponseFormat()
    if schema is not None:
        response_format = ResponseFormat("json_schema", schema.document)
    elif job.output.response_format == "json_object":
        response_format = ResponseFormat("json_object")
    try:
        # A column's tools are not known yet: a name is held against them row by row.
        choice = (
            ToolChoice("named", section.choice)
            if section.column is not None and section.choice not in ("auto", "none", "required")
            else ToolChoice("required")
            if section.column is not None and section.choice == "required"
            else parse_tool_choice(section.choice, tools, "[tools] choice")
        )
    except RowError as error:
        raise JobFileError(str(error)) from error
    return ChatOptions(
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=section.parallel,
        response_format=response_format,
        thinking={"auto": None, "enabled": True, "disabled": False}[job.thinking.mode],
        reasoning_effort=job.thinking.reasoning_effort,
        max_reasoning_tokens=job.thinking.max_reasoning_tokens,
    )


def _read_tools(path: str) -> tuple[Tool, ...]:
    try:
        tools = parse_tools(parse_json(storage.read_bytes(path).decode("utf-8-sig")), path)
    except FileNotFoundError as error:
        raise JobFileError(f"{path}: expected a JSON file of tools, found no such file") from error
    except (RowError, OSError, ValueError) as error:
        raise JobFileError(f"[tools] path: {path}: {error}") from error
    return tools


def _terms_of(job: Job, options: ChatOptions, schema: AnswerSchema | None) -> TermsBook:
    terms = TermsBook(options, schema, job.output.formats)
    try:
        terms.of(None)
    except RowError as error:
        raise JobFileError(f"[tools]: {error}") from error
    return terms


def _output_type(schema: AnswerSchema | None) -> OutputType | None:
    return output_type(schema.document, schema.formats) if schema is not None else None


def _terms_warnings(job: Job, engine: EngineConfig, terms: TermsBook) -> Iterable[str]:
    """What a person should know of the answers' terms before the run."""
    encoder = load_encoder(engine.path, engine.encoding, engine.name)
    thinking = thinks(encoder, terms.options)
    sampling = Sampling(**job.sampling.model_dump())
    today = datetime.now(UTC).date()
    yield from parameter_warnings(engine.name, today, thinking=thinking, sampling=sampling, options=terms.options)
    for tool in terms.options.tools:
        if tool.is_strict and (problems := strict_tool_problems(tool)):
            yield f"tool {tool.name!r} is strict, and DeepSeek's API would refuse it: {'; '.join(problems)}"
    is_constrained = engine.engine in CONSTRAINED_ENGINES and job.output.constrain == "auto"
    if is_constrained and isinstance(encoder, PromptEncoder):
        built = GrammarBook(encoder).build(terms.of(None), starts_in_reasoning=thinking)
        for relaxed in built.relaxed if built is not None else ():
            yield (
                f"{job.output.schema_ or '[tools]'}: {relaxed.keyword} at {relaxed.pointer or '/'} is not enforced "
                f"while answers are decoded ({relaxed.reason}); validation still checks it"
            )


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


def _column_problems(job: Job, scan: InputScan, template: PromptTemplate) -> Iterable[JobError]:
    section, prompt = job.input, job.prompt
    if scan.format == "jsonl":
        for key, value in (
            ("[prompt] system", prompt.system),
            ("[prompt] template", prompt.template),
            ("[prompt] messages_column", prompt.messages_column),
            ("[input] id_column", section.id_column),
            ("[input] tenant_column", section.tenant_column),
            ("[input] cost_center_column", section.cost_center_column),
            ("[input] passthrough", section.passthrough or None),
            ("[tools] column", job.tools.column),
            ("[accounting] tag_columns", job.accounting.tag_columns or None),
        ):
            if value is not None:
                yield JobFileError(f"{key}: not for JSONL input, whose lines bring their own ids and messages")
        return
    if prompt.template is None and prompt.messages_column is None:
        yield JobFileError("[prompt]: expected `template` (or `messages_column`), found neither")
    if not scan.names and scan.num_unreadable_files:
        return
    named = [("[prompt] template", name) for name in sorted(template.variables)]
    named += [
        (f"[input] {key}", name)
        for key, name in (
            ("id_column", section.id_column),
            ("tenant_column", section.tenant_column),
            ("cost_center_column", section.cost_center_column),
        )
        if name is not None
    ]
    if job.tools.column is not None:
        named.append(("[tools] column", job.tools.column))
    if prompt.messages_column is not None:
        named.append(("[prompt] messages_column", prompt.messages_column))
    if section.passthrough != "all":
        named += [("[input] passthrough", name) for name in section.passthrough]
    named += [("[accounting] tag_columns", name) for name in job.accounting.tag_columns]
    for key, name in named:
        if name not in scan.names:
            near = difflib.get_close_matches(name, scan.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; its columns are {', '.join(scan.names)}"
            yield JobFileError(f"{key}: {section.path} has no column {name!r}{hint}")
    for key, name in named:
        is_label = key == "[accounting] tag_columns" or (key.endswith("_column") and key.startswith("[input]"))
        if is_label and name in scan.schema.names:
            found = scan.schema.field(name).type
            if not _can_be_label(found):
                yield JobFileError(f"{key}: expected a column of text or whole numbers, found {name!r} of type {found}")
    taken = {field.lower() for field in RESULT_SCHEMA.names} | ({OUTPUT} if job.output.schema_ is not None else set())
    passed = scan.schema.names if section.passthrough == "all" else section.passthrough
    for name in dict.fromkeys((*passed, *job.accounting.tag_columns)):
        if name.lower() in taken:
            yield JobFileError(
                f"[input] passthrough: column {name!r} has the name of an output column (case ignored); "
                "rename it in the input or leave it out"
            )


def _can_be_label(found: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_string(found)
        or types.is_large_string(found)
        or types.is_string_view(found)
        or types.is_integer(found)
        or types.is_null(found)
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


def _columns(job: Job, scan: InputScan, template: PromptTemplate) -> ReadColumns:
    if scan.format == "jsonl":
        return ReadColumns(input_fields=JSONL_INPUT_FIELDS, passthrough=())
    column = job.prompt.messages_column
    names = sorted(template.variables) if column is None else [column]
    if job.tools.column is not None and job.tools.column not in names:
        names.append(job.tools.column)
    passed = scan.schema.names if job.input.passthrough == "all" else job.input.passthrough
    passed = (*passed, *job.accounting.tag_columns)
    fields: Mapping[str, pa.Field[Any]] = {name: scan.schema.field(name) for name in scan.schema.names}
    return ReadColumns(
        # Without a readable file no column is known; every unit then is a reject.
        input_fields=tuple(fields[name] for name in names if name in fields),
        passthrough=tuple(fields[name] for name in dict.fromkeys(passed) if name in fields),
        id_column=job.input.id_column if job.input.id_column in fields else None,
        tenant_column=job.input.tenant_column if job.input.tenant_column in fields else None,
        cost_center_column=job.input.cost_center_column if job.input.cost_center_column in fields else None,
    )


def _check_writable(columns: ReadColumns) -> None:
    """Some Arrow types have no Parquet form; better now than after the first paid shard."""
    for field in columns.passthrough:
        try:
            pq.write_table(result_schema([field]).empty_table(), io.BytesIO())
            pa.concat_arrays([pa.nulls(2, field.type)] * 2).take(pa.array([3, 0]))
        except (pa.ArrowException, ValueError) as error:
            raise JobFileError(
                f"[input] passthrough: column {field.name!r} of type {field.type} cannot be written to Parquet: {error}"
            ) from error
