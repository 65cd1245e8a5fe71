"""The contract that answers must keep: a JSON Schema, or a pydantic model, compiled once and asked a row at a time.

Stands inside the *answer* stage, before `transforms/validate.py`; `jobs/preflight.py` compiles it before anything is
paid for. Every problem of the schema itself is a `JobFileError`, every problem of an answer a `RowError`.

Validation is jsonschema-rs, whatever the engine. Nothing is ever fetched for a `$ref`: without an explicit retriever
the only resources are the document and the published meta-schemas that the library carries.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from typing import Any, Literal, NoReturn, TypeAlias, cast

import pydantic
from jsonschema_rs import ReferencingError, Registry, ValidationError, ValidationErrorKind, Validator, validator_for

from schemas.canonical import Json
from schemas.errors import EmptyAnswer, JobFileError, ModelRejected, NotJson, SchemaViolation
from schemas.storage import read_bytes
from schemas.strict_json import MAX_DEPTH, depth_of, has_lone_surrogate, parse_json

Formats: TypeAlias = Literal["assert", "annotate"]
Retriever: TypeAlias = Callable[[str], Json]

MAX_EXCERPT = 100
"""Most characters that an error message quotes of a value."""

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

    __slots__ = ("_retriever", "_validator", "document", "formats", "model", "source")

    def __init__(
        self,
        document: Json,
        *,
        formats: Formats,
        source: str,
        model: type[pydantic.BaseModel] | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        """Compile a schema; see `from_json` and `load`."""
        self.document = _own_copy(document, source)
        self.formats: Formats = formats
        self.source = source
        self.model = model
        self._retriever = retriever
        self._validator = _compile(self.document, formats, source, retriever)

    @classmethod
    def from_json(
        cls, document: Json, *, formats: Formats, source: str, retriever: Retriever | None = None
    ) -> "AnswerSchema":
        """Compile a JSON Schema document (an object or a boolean).

        Args:
            document: `$schema` selects draft 4, 6, 7, 2019-09 or 2020-12; the default is 2020-12.
            formats: `assert` makes `format` binding, `annotate` ignores it.
            source: how errors name the document.
            retriever: answers for other documents, by absolute URI; picklable. Without one they are refused.
        Raises:
            JobFileError: not a schema, an unknown `$schema`, or a `$ref` that leads nowhere or out of the document.
        """
        return cls(document, formats=formats, source=source, retriever=retriever)

    @classmethod
    def load(cls, reference: str, formats: Formats = "assert") -> "AnswerSchema":
        """Compile the schema that a job names: a JSON file, or a pydantic model as `package.module:Class`.

        Raises:
            JobFileError: the file or class cannot be read or imported, or is not a schema.
        """
        if _MODEL_REFERENCE.fullmatch(reference):
            model = _import_model(reference)
            return cls(_json_schema_of(model, reference), formats=formats, source=reference, model=model)
        return cls(_read_schema(reference), formats=formats, source=reference)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.document, self.formats, self.source, self.model, self._retriever)

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
        message = _describe(found[0])
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
                f"at {_pointer(first['loc'])}: {model.__name__} expected: {_abbreviate(first['msg'])}, "
                f"found {_excerpt(first['input'])}" + (f" (and {more} more)" if more else "")
            ) from error
        except Exception as error:
            # A validator of the user's own may raise anything; that is this answer's problem, not the job's.
            raise ModelRejected(
                f"{model.__name__} raised {type(error).__name__}: {_abbreviate(str(error))}; found {_abbreviate(text)}"
            ) from error


def _restore(
    document: Json,
    formats: Formats,
    source: str,
    model: type[pydantic.BaseModel] | None,
    retriever: Retriever | None,
) -> AnswerSchema:
    return AnswerSchema(document, formats=formats, source=source, model=model, retriever=retriever)


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
            raise _DuplicateKey(repr(key))
        seen.add(key)


def _import_model(reference: str) -> type[pydantic.BaseModel]:
    module_name, _, class_path = reference.partition(":")
    try:
        found: object = import_module(module_name)
    except Exception as error:
        # Importing runs the user's code, which may raise anything.
        raise JobFileError(
            f"{reference}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for name in class_path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise JobFileError(f"{reference}: {module_name!r} has no {class_path!r}") from error
    if not (isinstance(found, type) and issubclass(found, pydantic.BaseModel)):
        raise JobFileError(f"{reference}: expected a pydantic BaseModel class, found {_excerpt(repr(found))}")
    return found


def _json_schema_of(model: type[pydantic.BaseModel], reference: str) -> Json:
    try:
        return cast("Json", model.model_json_schema())
    except Exception as error:
        # Fields may bring their own schema code, which may raise anything.
        raise JobFileError(
            f"{reference}: expected a model with a JSON Schema, found {type(error).__name__}: {_abbreviate(str(error))}"
        ) from error


def _own_copy(document: Json, source: str) -> Json:
    try:
        copy = cast("Json", json.loads(json.dumps(document, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise JobFileError(f"{source}: expected a JSON Schema, found a value that is not JSON: {error}") from error
    if depth_of(copy) > MAX_DEPTH:
        raise JobFileError(f"{source}: expected a schema of at most {MAX_DEPTH} levels, found more")
    if has_lone_surrogate(copy):
        raise JobFileError(f"{source}: expected Unicode text, found a lone surrogate in a string")
    return copy


def _compile(document: Json, formats: Formats, source: str, retriever: Retriever | None) -> Validator:
    if not isinstance(document, Mapping | bool):
        raise JobFileError(
            f"{source}: at {_pointer(())}: expected a JSON Schema (an object or a boolean), found {_excerpt(document)}"
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
        raise JobFileError(f"{source}: not a JSON Schema: {_describe(error)}") from error
    except ValueError as error:
        raise JobFileError(f"{source}: this JSON Schema cannot be compiled: {_abbreviate(str(error))}") from error


def _check_drafts(document: Json, source: str) -> None:
    for path, schema in _subschemas(document):
        declared = schema.get("$schema")
        if not isinstance(declared, str) or (path and not isinstance(schema.get("$id", schema.get("id")), str)):
            continue
        name = declared.removesuffix("#").removeprefix("https://").removeprefix("http://")
        if name not in DRAFTS or "://" not in declared:
            raise JobFileError(
                f"{source}: at {_pointer((*path, '$schema'))}: expected draft 4, 6, 7, 2019-09 or 2020-12 "
                f"(such as https://{DRAFTS[-1]}), found {_excerpt(declared)}"
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
            at = f"{source}: at {_pointer((*path, keyword))}"
            target = reference.partition("#")[0]
            if target and any(uri.endswith(target) for uri in refused):
                return JobFileError(
                    f"{at}: expected a reference inside the document (nothing is ever fetched for a $ref), "
                    f"found {_excerpt(reference)}; copy what it names into $defs"
                )
            if not target and not _can_resolve(document, reference):
                return JobFileError(
                    f"{at}: expected a reference to something in the document, "
                    f"found {_excerpt(reference)}, which does not exist"
                )
    return JobFileError(f"{source}: a reference cannot be followed: {_abbreviate(reason)}")


def _can_resolve(document: Json, reference: str) -> bool:
    try:
        Registry([(_ROOT_URI, cast("dict[str, Any]", document))]).resolver(_ROOT_URI).lookup(reference)
    except ReferencingError:
        return False
    except ValueError:
        # The document refers outside itself as well, so that no registry can be built; another reference is named.
        return True
    return True


def _describe(error: ValidationError) -> str:
    """One violation as pointer, keyword, expected and found; never longer than a few excerpts."""
    return f"at {_pointer(error.instance_path)}: {_complaint(error)}, found {_found(error)}"


def _complaint(error: ValidationError) -> str:
    return f"{error.kind.name}: expected {_expected(error.kind)}"


def _expected(kind: ValidationErrorKind) -> str:
    match kind:
        case ValidationErrorKind.Type(types=types):
            return " or ".join(types)
        case ValidationErrorKind.Required(property=name):
            return f"a property {_excerpt(name)}"
        case ValidationErrorKind.AnyOf(context=context) | ValidationErrorKind.OneOfNotValid(context=context):
            return _abbreviate("one of: " + "; ".join(_complaint(branch[0]) for branch in context if branch))
        case ValidationErrorKind.OneOfMultipleValid():
            return "exactly one alternative to match, not several"
        case ValidationErrorKind.AdditionalProperties() | ValidationErrorKind.UnevaluatedProperties():
            return "no properties beyond those of the schema"
        case ValidationErrorKind.PropertyNames(error=inner):
            return f"names that keep {_complaint(inner)}"
        case ValidationErrorKind.FalseSchema():
            return "nothing here"
        case ValidationErrorKind.UniqueItems():
            return "items that differ"
        case ValidationErrorKind.Contains():
            return "an item that matches"
        case ValidationErrorKind.Not(schema=schema):
            return f"anything but {_excerpt(schema)}"
        case _:
            return _excerpt(kind.value)


def _found(error: ValidationError) -> str:
    match error.kind:
        case ValidationErrorKind.AdditionalProperties(unexpected=names):
            return _excerpt(names)
        case ValidationErrorKind.UnevaluatedProperties(unexpected=names):
            return _excerpt(names)
        case _:
            return _excerpt(error.instance)


def _pointer(path: Sequence[str | int]) -> str:
    """A JSON pointer (RFC 6901); `the root` for the empty one, which would not be seen."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return _abbreviate("".join(f"/{step}" for step in steps)) or "the root"


def _excerpt(value: object) -> str:
    pieces: list[str] = []
    length = 0
    for piece in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_EXCERPT:
            break
    return _abbreviate("".join(pieces))


def _abbreviate(text: str) -> str:
    return text if len(text) <= MAX_EXCERPT else f"{text[: MAX_EXCERPT - 1]}…"
