"""The job: everything a person decides about a run, as the sections of a job file.

Frozen and picklable; every stage receives the section it needs. Reading TOML, `--set` overrides and paths is
`jobs/check/job_file.py`; what can only be known by looking at files is checked by `jobs/check/preflight.py`.
"""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.job.model import ModelSection, check_model, default_model
from moebeam.schemas.job.section import Section
from moebeam.schemas.lakehouse.table_url import parse_table_url
from moebeam.schemas.records import Sampling


class PromptSection(Section):
    """`[prompt]`: how a row becomes chat messages."""

    system: str | None = Field(default=None, description="System message, a Jinja template")
    template: str | None = Field(default=None, description="User message, a Jinja template over the input's columns")
    messages_column: str | None = Field(default=None, description="Column that holds whole chats instead of a template")
    max_template_steps: int = Field(default=10_000, gt=0, description="Loop iterations one row's templates may take")
    max_template_s: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="Processor time one row's templates may take, and its schema, in seconds",
    )

    @model_validator(mode="after")
    def _check_one_source(self) -> "PromptSection":
        if self.messages_column is not None and (self.template is not None or self.system is not None):
            raise ValueError("`messages_column` brings whole chats: leave out `template` and `system`")
        return self


class OutputSection(Section):
    """`[output]`: where tables go and what an answer must look like."""

    path: Annotated[str, Field(min_length=1, description="Folder of the run; it belongs to this job alone")]
    table: str | None = Field(
        default=None,
        description="Table of a lakehouse to which a finished run is committed: `iceberg://CATALOG/NAMESPACE.TABLE`, a "
        "catalog that pyiceberg is configured for, or `delta://FOLDER`; rejects and ledger go beside it, to "
        "`TABLE_rejects` and `TABLE_ledger`",
    )
    replace_where: str | None = Field(
        default=None,
        min_length=1,
        description="Column of the results, such as one that names tenants: the rows of `table` with a value that the "
        "run has in it are replaced, of rejects too; without it a run only adds rows",
    )
    schema_: str | None = Field(
        default=None, alias="schema", description="A JSON Schema file, or a pydantic model as `package.module:Class`"
    )
    formats: Literal["assert", "annotate"] = Field(
        default="assert", description="Whether JSON Schema `format` is checked"
    )
    response_format: Literal["auto", "text", "json_object"] = Field(
        default="auto",
        description="Form of the answer: `auto` is JSON that keeps the schema where there is one, else text",
    )
    schema_in_prompt: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether the prompt contains the schema; `auto` where the model's encoding has a place for it",
    )
    constrain: Literal["auto", "never"] = Field(
        default="auto", description="Whether engines in process constrain decoding to answers of the requested form"
    )
    max_reject_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of rejected rows that still exits with 0"
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @field_validator("table")
    @classmethod
    def _check_table(cls, value: str | None) -> str | None:
        if value is not None:
            parse_table_url(value)
        return value

    @model_validator(mode="after")
    def _check_replaced(self) -> "OutputSection":
        if self.replace_where is not None and self.table is None:
            raise ValueError(f"replace_where: expected `table` beside it, found {self.replace_where!r} without")
        return self


class SamplingSection(Section):
    """`[sampling]`: how tokens are sampled; a request's own values win."""

    max_tokens: int = Field(default=512, gt=0, description="Maximum tokens of an answer")
    temperature: float = Field(default=0.0, ge=0, le=2, description="0 is greedy: same prompt, same answer")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Share of the probability mass to sample from")
    stop: tuple[str, ...] = Field(default=(), max_length=16, description="Texts that end an answer")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Minimum probability of a token, as a share of the likeliest token's"
    )
    logprobs: bool = Field(default=False, description="Whether answers carry the log probability of each token")
    top_logprobs: int = Field(
        default=0,
        ge=0,
        le=20,
        description="How many of the likeliest tokens at each place come with log probabilities; needs `logprobs`",
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Subtracted from a token's logit for each time that the answer holds it"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Subtracted once from the logit of each token that the answer holds"
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="Makes sampled answers repeatable; every row and every sample of it still draws its own. Without "
        "one, each run draws anew, and a run that is resumed goes on as it began",
    )
    n: int = Field(
        default=1,
        ge=1,
        le=128,
        description="Answers a row, each with its number in the column `sample`; they share one prompt, and with "
        "`temperature` 0 one answer",
    )

    @model_validator(mode="after")
    def _check_logprobs(self) -> "SamplingSection":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: expected `logprobs` beside it, found {self.top_logprobs} without")
        return self

    @property
    def of_one_answer(self) -> Sampling:
        """How each of the `n` answers is sampled."""
        return Sampling(**self.model_dump(exclude={"n"}))


class ThinkingSection(Section):
    """`[thinking]`: whether and how long the model reasons before it answers; a request's own values win."""

    mode: Literal["auto", "enabled", "disabled"] = Field(
        default="auto", description="`auto` leaves it to the model's encoding"
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="Such as `low`, `high` or `max`, as the model has them; `none` switches thinking off",
    )
    max_reasoning_tokens: int | None = Field(
        default=None, gt=0, description="Ends reasoning after this many tokens; engines in process only"
    )


class ToolsSection(Section):
    """`[tools]`: functions that the model may call; a request's own values win."""

    path: str | None = Field(default=None, description="JSON file: a list of tools in OpenAI's form")
    column: str | None = Field(default=None, description="Column that holds each row's tools, as JSON or as structs")
    choice: str = Field(default="auto", description="`auto`, `none`, `required` or the name of a tool")
    parallel: bool = Field(default=True, description="Whether one answer may call several tools")


class RepairSection(Section):
    """`[repair]`: what happens to an answer that breaks its contract."""

    max_attempts: int = Field(
        default=2, ge=1, le=10, description="Maximum attempts per row, the first included; 1 never asks again"
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Temperature of later attempts; default the row's own"
    )


class PlanSection(Section):
    """`[plan]`: how rows are cut into shards."""

    max_shard_tokens: int = Field(
        default=1_000_000,
        gt=0,
        description="Maximum expected tokens per shard, uncached input plus output, not counting its first prefix",
    )
    max_shard_rows: int = Field(
        default=1024, gt=0, description="Maximum rows per shard; requests that are answered together stay together"
    )
    merge: Literal["auto", "always", "never"] = Field(
        default="auto", description="Answer identical requests once: `auto` where sampling is greedy"
    )


class AccountingSection(Section):
    """`[accounting]`: what tokens cost."""

    price_book: str | None = Field(
        default=None, description="CSV of dated prices, or `builtin` for the one that ships; without it costs are null"
    )
    provider: str | None = Field(default=None, description="Provider to look up; default the engine's own")
    model: str | None = Field(default=None, description="Model to look up; default `[model] name`")
    tag_columns: tuple[str, ...] = Field(
        default=(),
        description="Input columns that become tags of ledger lines; also passed through, and with them "
        "`[plan] merge` is `auto` for no request",
    )


class LimitsSection(Section):
    """`[limits]`: when a run stops; resume it with a larger limit. Earlier attempts of the run count."""

    max_cost: Annotated[Decimal, Field(gt=0)] | None = Field(
        default=None, description="Maximum billed, in the price book's currency; a number, or a string to be exact"
    )
    max_input_tokens: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Maximum prompt tokens")
    max_output_tokens: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Maximum tokens of answers")
    max_requests: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Maximum requests, further attempts included"
    )
    deadline: Annotated[float, Field(gt=0)] | str | None = Field(
        default=None,
        description="No request starts later, and none outlasts it by more than `[failures] drain_s`: minutes from the "
        "start of each attempt, or a time such as `2026-10-01T06:00:00Z`, in quotes",
    )

    @field_validator("deadline")
    @classmethod
    def _check_instant(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, str):
            _parse_instant(value)
        return value

    def deadline_at(self, now: float) -> float | None:
        """The deadline of an attempt that starts `now`; both in seconds since the epoch."""
        if self.deadline is None:
            return None
        return _parse_instant(self.deadline) if isinstance(self.deadline, str) else now + 60 * self.deadline


def _parse_instant(text: str) -> float:
    """An ISO time with a time zone, in seconds since the epoch."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None:
        raise ValueError(f"expected minutes, or a time with its zone such as 2026-10-01T06:00:00Z, found {text!r}")
    return instant.timestamp()


class FailuresSection(Section):
    """`[failures]`: what happens when the engine cannot answer a row."""

    on_error: Literal["reject", "fail"] = Field(
        default="reject", description="`reject` writes the row to rejects; `fail` stops the job at the first such row"
    )
    max_retries: int = Field(
        default=2, ge=0, le=20, description="Retries of a row whose engine was overloaded or timed out"
    )
    retry_wait_s: float = Field(
        default=1.0, ge=0, le=60, description="Seconds before the first retry; doubles with each further one"
    )
    engine_process: Literal["auto", "own", "host", "shared"] = Field(
        default="auto",
        description="`own` runs each worker's engine in a process of its own: a row that crashes it is isolated and "
        "rejected; `host` does the same with one engine, and one copy of the weights, for all workers of a host; "
        "`shared` runs it in the worker's process; `auto` is `own` where `max_silence_s` is set or an earlier "
        "attempt of the run was killed, else `shared`",
    )
    max_silence_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Restarts an engine in process that has neither answered nor reported progress for this long",
    )
    journal: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether each answer is stored as it arrives, so that nothing is asked twice after a crash; "
        "`auto` where a provider is paid for answers",
    )

    max_outage_s: float = Field(
        default=600.0,
        ge=0,
        description="How long a run waits for a provider that answers nobody before it ends unfinished; no row is "
        "rejected for an outage",
    )
    max_same_refusals: int = Field(
        default=20,
        ge=1,
        description="Rows that one provider may refuse with the same error, with no answer between them, before the "
        "run stops",
    )
    drain_s: float = Field(
        default=5.0,
        ge=0,
        le=600,
        description="Seconds for which answers that are on their way are still awaited once a run is asked to stop",
    )

    @model_validator(mode="after")
    def _check_silence(self) -> "FailuresSection":
        if self.max_silence_s is not None and self.engine_process == "shared":
            raise ValueError("`max_silence_s` needs an engine that can be ended: leave out `engine_process`")
        return self


class PartySection(Section):
    """One party of `[value_chain]`: who it is and what it charges the next one."""

    name: Annotated[str, Field(min_length=1, description="As the report names it")]
    price_book: str | None = Field(
        default=None, description="CSV of dated prices at which it sells, or `builtin` for the one that ships"
    )
    provider: str | None = Field(default=None, description="Provider to look up in its book; default the name")
    model: str | None = Field(default=None, description="Model to look up in its book; default the ledger's")
    markup_percent: Annotated[Decimal, Field(ge=-100)] | None = Field(
        default=None, description="What it adds to what it pays, in percent; a number, or text to be exact"
    )
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = Field(
        default=None, description="Expected currency of its price book"
    )
    recognition: Literal["gross", "net"] = Field(
        default="gross",
        description="Revenue that it recognises: `gross` as a principal, all that it charges; `net` as an agent, "
        "its margin alone",
    )
    charges: Literal["all", "answered"] = Field(
        default="all", description="`answered` charges no attempt that gave no valid answer"
    )

    @model_validator(mode="after")
    def _check_one_price(self) -> "PartySection":
        if self.price_book is not None and self.markup_percent is not None:
            raise ValueError(f"party {self.name!r}: expected `price_book` or `markup_percent`, found both")
        return self


class ValueChainSection(Section):
    """`[value_chain]`: who charges whom for the run's tokens; used by reports only."""

    parties: tuple[PartySection, ...] = Field(
        default=(), description="From the model provider to the customer, as `[[value_chain.parties]]`"
    )
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] | None = Field(
        default=None, description="Currency of the report; default that of the ledger"
    )
    rates: dict[str, Annotated[Decimal, Field(gt=0)]] = Field(
        default_factory=dict,
        description='Units of the currency of the report for one unit of another, such as `CNY = "0.14"`; '
        "from a source of yours, none is built in",
    )

    @field_validator("parties")
    @classmethod
    def _check_names(cls, parties: tuple[PartySection, ...]) -> tuple[PartySection, ...]:
        names = [party.name for party in parties]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parties: expected every name once, found {', '.join(repeated)} again")
        if len(names) == 1:
            raise ValueError(f"parties: expected at least a seller and a customer, found only {names[0]!r}")
        if parties and (parties[-1].price_book is not None or parties[-1].markup_percent is not None):
            raise ValueError(f"parties: expected the last one to be the customer, found that {names[-1]!r} sells")
        for party in parties[1:-1]:
            if party.price_book is None and party.markup_percent is None:
                raise ValueError(f"parties: {party.name!r}: expected `price_book` or `markup_percent`, found neither")
        if parties and parties[0].markup_percent is not None:
            raise ValueError(f"parties: {names[0]!r} buys from nobody: expected `price_book`, or the run's ledger")
        return parties


class Job(Section):
    """A whole job file."""

    input: InputSection
    prompt: PromptSection = Field(default_factory=PromptSection)
    output: OutputSection
    model: SerializeAsAny[ModelSection] = Field(default_factory=default_model)
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    thinking: ThinkingSection = Field(default_factory=ThinkingSection)
    tools: ToolsSection = Field(default_factory=ToolsSection)
    repair: RepairSection = Field(default_factory=RepairSection)
    plan: PlanSection = Field(default_factory=PlanSection)
    accounting: AccountingSection = Field(default_factory=AccountingSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)
    failures: FailuresSection = Field(default_factory=FailuresSection)
    value_chain: ValueChainSection = Field(default_factory=ValueChainSection)
    _folder: str | None = PrivateAttr(default=None)
    _check_model = field_validator("model", mode="before")(check_model)

    @property
    def folder(self) -> str | None:
        """Where the job file lies, beside which a pydantic model's module may lie; None for a job made in Python."""
        return self._folder

    def in_folder(self, folder: str) -> "Job":
        """The same job, of a file in `folder`."""
        source = self.input if self.input.query is None else self.input.in_folder(folder)
        job = self.model_copy(update={"input": source})
        job._folder = folder
        return job
