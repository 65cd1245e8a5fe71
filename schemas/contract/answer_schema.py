"""The contract that answers must keep: a JSON Schema, or a pydantic model, compiled once and asked a row at a time.

Stands inside the *answer* stage, before `transforms/answer/validate.py`; `jobs/check/preflight.py` compiles it before
anything is paid for. Every problem of the schema itself is a `JobFileError`, every problem of an answer a `RowError`.

Validation is jsonschema-rs, whatever the engine. Nothing is ever fetched for a `$ref`: without an explicit retriever
the only resources are the document and the published meta-schemas that the library carries.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, cast

import pydantic
from jsonschema_rs import ReferencingError, Registry, ValidationError, ValidationErrorKind, Validator, validator_for

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.strict_json import MAX_DEPTH, depth_of, has_lone_surrogate, parse_json
from moebeam.schemas.contract.user_module import ModuleSources, ShippedClass, import_user_module
from moebeam.schemas.contract.wording import (
    MAX_EXCERPT,
    describe_error,
    describe_violation,
    excerpt,
    pointer_of,
    shorten,
)
from moebeam.schemas.errors import EmptyAnswer, JobFileError, ModelRejected, NotJson, SchemaViolation, abbreviated
from moebeam.schemas.store.storage import read_bytes

Formats: TypeAlias = Literal["assert", "annotate"]
Retriever: TypeAlias = Callable[[str], Json]

MAX_COUNTED_VIOLATIONS = 20

DRAFTS = (
    "json-schema.org/draft-04/schema",
    "json-schema.org/draft-06/schema",
    "json-schema.org/draft-07/schema",
    "json-schema.org/draft/2019-09/schema",
    "json-schema.org/draft/2020-12/schema",
)
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_DATA_KEYWORDS = frozenset({"const", "enum", "default", "examples", "example"})
_MODEL_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_ROOT_URI = "json-schema:///"


class AnswerSchema:
    """A compiled output contract; picklable (it compiles again where it arrives) and safe to share between threads.

    Attributes:
        document: the JSON Schema, for prompts and fingerprints; not to be changed.
        formats: whether `format` is asserted or only an annotation.
        source: the file or class it came from, as errors name it.
        model: the pydantic model that validates too, if there is one.
    """

    __slots__ = ("_retriever", "_shipped", "_validator", "document", "formats", "model", "source")

    def __init__(
        self,
        document: Json,
        *,
        formats: Formats,
        source: str,
        model: type[pydantic.BaseModel] | None = None,
        retriever: Retriever | None = None,
        shipped: ShippedClass | None = None,
    ) -> None:
        """Compile a schema; see `from_json` and `load`. `shipped` is pickled in the place of `model`."""
        self.document = _own_copy(document, source)
        self.formats: Formats = formats
        self.source = source
        self.model = model
        self._retriever = retriever
        self._shipped = shipped
        self._validator = _compile(self.document, formats, source, retriever)

    @classmethod
    def from_json(
        cls, document: Json, *, formats: Formats, source: str, retriever: Retriever | None = None
    ) -> "AnswerSchema":
        """Compile a JSON Schema document (an object or a boolean).

        Equal documents of one source are compiled once in a process and shared, so that the same tools may be asked
        for with every request. Finding one again takes microseconds.

        Args:
            document: `$schema` selects draft 4, 6, 7, 2019-09 or 2020-12; the default is 2020-12.
            formats: `assert` makes `format` binding, `annotate` ignores it.
            source: how errors name the document.
            retriever: answers for other documents, by absolute URI; picklable. Without one they are refused.
        Raises:
            JobFileError: not a schema, an unknown `$schema`, or a `$ref` that leads nowhere or out of the document.
        """
        if retriever is not None:
            return cls(document, formats=formats, source=source, retriever=retriever)
        try:
            return _compile_once(json.dumps(document, ensure_ascii=False, allow_nan=False), formats, source)
        except (TypeError, ValueError, RecursionError):
            return cls(document, formats=formats, source=source)  # Raises, and says what is wrong.

    @classmethod
    def load(cls, reference: str, formats: Formats = "assert", folder: str | Path | None = None) -> "AnswerSchema":
        """Compile the schema that a job names: a JSON file, or a pydantic model as `package.module:Class`.

        Pickled, the schema brings the source of the model's module along (see `moebeam.schemas.contract.user_module`).

        Args:
            folder: the job file's, where modules are looked for first; the path of a JSON file is taken as it is.
        Raises:
            JobFileError: the file or class cannot be read, imported or shipped, or is not a schema.
        """
        if _MODEL_REFERENCE.fullmatch(reference):
            model, shipped = _import_model(reference, folder)
            document = _json_schema_of(model, reference)
            return cls(document, formats=formats, source=reference, model=model, shipped=shipped)
        return cls(_read_schema(reference), formats=formats, source=reference)

    @property
    def code_digest(self) -> str | None:
        """Names the source of the model's module and what it ships with; None without a model, or for installed ones.

        Validators may change while the JSON Schema stays the same.
        """
        return None if self._shipped is None else self._shipped.sources.digest

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.document, self.formats, self.source, self._shipped or self.model, self._retriever)

    def __repr__(self) -> str:
        return f"AnswerSchema(source={self.source!r}, formats={self.formats!r})"

    def check(self, text: str) -> Json:
        """Parse an answer and hold it against the contract.

        Returns:
            The parsed value; of duplicate keys the last one, integers exact.
        Raises:
            EmptyAnswer: nothing but white space.
            NotJson: not one JSON value (RFC 8259), or one that no reader keeps whole; says where.
            SchemaViolation: breaks the JSON Schema; names pointer, keyword, expected and found.
            ModelRejected: the pydantic model refused it.
        """
        stripped = text.strip()
        if not stripped:
            raise EmptyAnswer(f"expected JSON, found {'an empty text' if not text else 'only white space'}")
        value = parse_json(stripped)
        if not self._validator.is_valid(value):
            raise SchemaViolation(self._describe_violations(value))
        if self.model is not None:
            self._check_model(self.model, stripped)
        return value

    def _describe_violations(self, value: Json) -> str:
        found = list(islice(self._validator.iter_errors(value), MAX_COUNTED_VIOLATIONS + 1))
        more = len(found) - 1
        message = describe_violation(found[0])
        if more == MAX_COUNTED_VIOLATIONS:
            return f"{message} (and at least {more} more violations)"
        return f"{message} (and {more} more violation{'s' * (more > 1)})" if more else message

    def _check_model(self, model: type[pydantic.BaseModel], text: str) -> None:
        try:
            model.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            more = error.error_count() - 1
            raise ModelRejected(
                f"at {pointer_of(first['loc'])}: {model.__name__} expected: {shorten(first['msg'])}, "
                f"found {excerpt(first['input'])}" + (f" (and {more} more)" if more else "")
            ) from error
        except Exception as error:
            # A validator of the user's own may raise anything; that is this answer's problem, not the job's.
            raise ModelRejected(f"{model.__name__} raised {describe_error(error)}; found {shorten(text)}") from error


def _restore(
    document: Json,
    formats: Formats,
    source: str,
    model: type[pydantic.BaseModel] | ShippedClass | None,
    retriever: Retriever | None,
) -> AnswerSchema:
    if model is None:
        return AnswerSchema.from_json(document, formats=formats, source=source, retriever=retriever)
    shipped = model if isinstance(model, ShippedClass) else None
    found = cast("type[pydantic.BaseModel]", model if shipped is None else shipped.restore())
    return AnswerSchema(document, formats=formats, source=source, model=found, retriever=retriever, shipped=shipped)


@lru_cache(maxsize=512)
def _compile_once(text: str, formats: Formats, source: str) -> AnswerSchema:
    """Compile a document from its JSON text, which unlike the document cannot change."""
    return AnswerSchema(cast("Json", json.loads(text)), formats=formats, source=source)


def _read_schema(path: str) -> Json:
    try:
        content = read_bytes(path)
    except FileNotFoundError as error:
        raise JobFileError(
            f"{path}: expected a JSON Schema file or a pydantic model as package.module:Class, found no such file"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise JobFileError(f"{path}: the schema file cannot be read: {error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobFileError(f"{path}: expected JSON in UTF-8, found other bytes at byte {error.start}") from error
    try:
        document = parse_json(text)
        json.loads(text, object_pairs_hook=_refuse_duplicates)
    except NotJson as error:
        raise JobFileError(f"{path}: expected a JSON Schema, found text that is not JSON: {error}") from error
    except _DuplicateKey as error:
        raise JobFileError(f"{path}: expected every key once in an object, found {error} twice") from error
    return document


class _DuplicateKey(Exception):
    """An object of a schema names a key twice, so one constraint would be lost without a word."""


def _refuse_duplicates(pairs: list[tuple[str, Json]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _DuplicateKey(abbreviated(key, MAX_EXCERPT))
        seen.add(key)


def _import_model(reference: str, folder: str | Path | None) -> tuple[type[pydantic.BaseModel], ShippedClass | None]:
    module_name, _, class_path = reference.partition(":")
    try:
        module = import_user_module(module_name, folder)
        sources = ModuleSources.collect(module)
    except JobFileError as error:
        raise JobFileError(f"{reference}: {error}") from error
    found: object = module
    for name in class_path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise JobFileError(f"{reference}: {module_name!r} has no {class_path!r}") from error
    if not (isinstance(found, type) and issubclass(found, pydantic.BaseModel)):
        raise JobFileError(f"{reference}: expected a pydantic BaseModel class, found {excerpt(repr(found))}")
    return found, None if sources is None else ShippedClass(sources, class_path)


def _json_schema_of(model: type[pydantic.BaseModel], reference: str) -> Json:
    try:
        return cast("Json", model.model_json_schema())
    except Exception as error:
        # Fields may bring their own schema code, which may raise anything.
        raise JobFileError(
            f"{reference}: expected a model with a JSON Schema, found {describe_error(error)}"
        ) from error


def _own_copy(document: Json, source: str) -> Json:
    try:
        copy = cast("Json", json.loads(json.dumps(document, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise JobFileError(
            f"{source}: expected a JSON Schema, found a value that is not JSON: {describe_error(error)}"
        ) from error
    if depth_of(copy) > MAX_DEPTH:
        raise JobFileError(f"{source}: expected a schema of at most {MAX_DEPTH} levels, found more")
    if has_lone_surrogate(copy):
        raise JobFileError(f"{source}: expected Unicode text, found a lone surrogate in a string")
    return copy


def _compile(document: Json, formats: Formats, source: str, retriever: Retriever | None) -> Validator:
    if not isinstance(document, Mapping | bool):
        raise JobFileError(
            f"{source}: at {pointer_of(())}: expected a JSON Schema (an object or a boolean), found {excerpt(document)}"
        )
    refused: list[str] = []

    def refuse(uri: str) -> NoReturn:
        refused.append(uri)
        raise LookupError("nothing is ever fetched for a $ref")

    if retriever is None:
        _check_drafts(document, source)
    schema = cast("dict[str, Any] | bool", document)
    try:
        # `retriever or refuse` also keeps the library from its own HTTP client.
        return validator_for(schema, validate_formats=formats == "assert", retriever=cast("Any", retriever or refuse))
    except ValidationError as error:
        if isinstance(error.kind, ValidationErrorKind.Referencing):
            raise _reference_error(document, source, refused, error.message) from error
        raise JobFileError(f"{source}: not a JSON Schema: {describe_violation(error)}") from error
    except ValueError as error:
        raise JobFileError(f"{source}: this JSON Schema cannot be compiled: {shorten(str(error))}") from error


def _check_drafts(document: Json, source: str) -> None:
    for path, schema in _subschemas(document):
        declared = schema.get("$schema")
        if not isinstance(declared, str) or (path and not isinstance(schema.get("$id", schema.get("id")), str)):
            continue
        name = declared.removesuffix("#").removeprefix("https://").removeprefix("http://")
        if name not in DRAFTS or "://" not in declared:
            raise JobFileError(
                f"{source}: at {pointer_of((*path, '$schema'))}: expected draft 4, 6, 7, 2019-09 or 2020-12 "
                f"(such as https://{DRAFTS[-1]}), found {excerpt(declared)}"
            )


def _subschemas(document: Json) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Json]]]:
    """Every object that may be a schema, with its path, in document order; plain data is passed over."""
    waiting: list[tuple[tuple[str | int, ...], Json]] = [((), document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            yield path, value
            waiting.extend(((*path, key), value[key]) for key in reversed(list(value)) if key not in _DATA_KEYWORDS)
        elif isinstance(value, list):
            waiting.extend(((*path, index), value[index]) for index in reversed(range(len(value))))


def _reference_error(document: Json, source: str, refused: Sequence[str], reason: str) -> JobFileError:
    """Name the reference that could not be followed: the library tells the reason, but not the place."""
    for path, schema in _subschemas(document):
        for keyword in _REFERENCES:
            reference = schema.get(keyword)
            if not isinstance(reference, str):
                continue
            at = f"{source}: at {pointer_of((*path, keyword))}"
            target = reference.partition("#")[0]
            if target and any(uri.endswith(target) for uri in refused):
                return JobFileError(
                    f"{at}: expected a reference inside the document (nothing is ever fetched for a $ref), "
                    f"found {excerpt(reference)}; copy what it names into $defs"
                )
            if not target and not _can_resolve(document, reference):
                return JobFileError(
                    f"{at}: expected a reference to something in the document, "
                    f"found {excerpt(reference)}, which does not exist"
                )
    return JobFileError(f"{source}: a reference cannot be followed: {shorten(reason)}")


def _can_resolve(document: Json, reference: str) -> bool:
    try:
        Registry([(_ROOT_URI, cast("dict[str, Any]", document))]).resolver(_ROOT_URI).lookup(reference)
    except ReferencingError:
        return False
    except ValueError:
        # The document refers outside itself as well, so that no registry can be built; another reference is named.
        return True
    return True
