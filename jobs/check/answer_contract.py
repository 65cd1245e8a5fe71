"""The contract of a job's answers, compiled from its job file before the run: schema, tools and thinking.

Part of `jobs/check/preflight.py`. *answer* applies the terms to the engine and to each answer. Terms that decoding
cannot enforce, or that the model does not support, become warnings here.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from moebeam.jobs.check.engine_config import CheckedEngine, thinks
from moebeam.model_runner.checkpoint.parameter_warnings import parameter_warnings
from moebeam.model_runner.checkpoint.strict_tools import strict_tool_problems
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.fence.fenced_schema import vet_schema
from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, Tool, ToolChoice, parse_tool_choice, parse_tools
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.output_type import OutputType, output_type
from moebeam.schemas.contract.strict_json import parse_json
from moebeam.schemas.errors import InvalidGrammar, JobFileError, RowError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.transforms.answer.grammar_cache import GrammarCache
from moebeam.transforms.render.answer_terms import TermsCache


def answer_schema(job: Job) -> AnswerSchema | None:
    """Compile the answer schema; None if the job has none.

    Raises:
        JobError: the schema cannot be read or compiled, or `response_format` contradicts it.
    """
    section = job.output
    if section.schema_ is None:
        return None
    if section.response_format != "auto":
        raise JobFileError(
            f"[output] response_format: expected `auto` beside `schema`, found {section.response_format!r}"
        )
    return AnswerSchema.load(section.schema_, section.formats, job.folder, vet=vet_schema)


def answer_options(job: Job, schema: AnswerSchema | None) -> ChatOptions:
    """The options of every row that brings none of its own.

    Raises:
        JobFileError: the tools cannot be read, or lack the one that must be called.
    """
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
        # A column's tools are not known yet: the name is checked per row.
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
        service_tier=job.model.service_tier if isinstance(job.model, OpenAIOptions) else None,
    )


def answer_terms(job: Job, options: ChatOptions, schema: AnswerSchema | None) -> TermsCache:
    """Compile the terms of answers.

    Raises:
        JobFileError: a tool's parameters cannot be compiled.
    """
    terms = TermsCache(options, schema, job.output.formats, job.prompt.max_template_s)
    try:
        terms.find(None)
    except RowError as error:
        raise JobFileError(f"[tools]: {error}") from error
    return terms


def answer_type(schema: AnswerSchema | None) -> OutputType | None:
    """The type of the column `output`; None if there is no such column."""
    return output_type(schema.document, schema.formats) if schema is not None else None


def terms_warnings(job: Job, checked: CheckedEngine, terms: TermsCache) -> Iterable[str]:
    """Warn about terms that will not be enforced or that the model does not support."""
    engine, encoder = checked.config, checked.encoder
    thinking = thinks(encoder, terms.options)
    sampling = job.sampling.of_one_answer
    today = datetime.now(UTC).date()
    yield from parameter_warnings(engine.name, today, thinking=thinking, sampling=sampling, options=terms.options)
    if job.sampling.n > 1 and sampling.is_greedy:
        yield f"[sampling] n = {job.sampling.n} with temperature 0: the answers of a row are equal"
    for tool in terms.options.tools:
        if tool.is_strict and (problems := strict_tool_problems(tool)):
            yield f"tool {tool.name!r} is strict, and DeepSeek's API would refuse it: {'; '.join(problems)}"
    is_constrained = engine.options.is_constrained and job.output.constrain == "auto"
    if is_constrained and isinstance(encoder, PromptEncoder):
        try:
            built = GrammarCache(encoder).build(terms.find(None), starts_in_reasoning=thinking)
        except InvalidGrammar as error:
            yield f"{job.output.schema_ or '[tools]'}: answers are not held to it while they are decoded: {error}"
            return
        for relaxed in built.relaxed if built is not None else ():
            yield (
                f"{job.output.schema_ or '[tools]'}: {relaxed.keyword} at {relaxed.pointer or '/'} is not enforced "
                f"while answers are decoded ({relaxed.reason}); validation still checks it"
            )
        narrowed: dict[tuple[str, str], list[str]] = {}
        for entry in built.narrowed if built is not None else ():
            narrowed.setdefault((entry.keyword, entry.reason), []).append(entry.pointer or "/")
        for (keyword, reason), pointers in narrowed.items():
            more = f" and {len(pointers) - 3} more" if len(pointers) > 3 else ""
            yield (
                f"{job.output.schema_ or '[tools]'}: of what {keyword} allows, not all can be generated ({reason}): "
                f"{', '.join(pointers[:3])}{more}"
            )


def _read_tools(path: str) -> tuple[Tool, ...]:
    try:
        tools = parse_tools(parse_json(storage.read_bytes(path).decode("utf-8-sig")), path)
    except FileNotFoundError as error:
        raise JobFileError(f"{path}: expected a JSON file of tools, found no such file") from error
    except (RowError, OSError, ValueError) as error:
        raise JobFileError(f"[tools] path: {path}: {error}") from error
    return tools
