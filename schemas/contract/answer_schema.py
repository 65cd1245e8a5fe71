"""The contract that answers must satisfy: a JSON Schema or a pydantic model, compiled once and checked per row.

`jobs/check/preflight.py` compiles it before anything is billed; `transforms/answer/validate.py` applies it. Problems of
the schema are `JobFileError`s, problems of an answer `RowError`s.

jsonschema-rs validates for every engine. Nothing is ever fetched for a `$ref`: without an explicit retriever the only
resources are the document and the meta-schemas bundled with the library.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, cast

import pydantic
from jsonschema_rs import ValidationError, ValidationErrorKind, Validator, validator_for

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.references import DRAFTS, References, SchemaLocation, read_draft, walk_schemas
from moebeam.schemas.contract.schema_bounds import find_excess
from moebeam.schemas.contract.strict_json import (
    MAX_DEPTH,
    has_lone_surrogate,
    keep_last_keys,
    measure_depth,
    parse_json,
)
from moebeam.schemas.contract.user_module import ModuleSources, ShippedClass, import_user_module
from moebeam.schemas.contract.wording import (
    MAX_EXCERPT,
    describe_error,
    describe_violation,
    excerpt,
    format_pointer,
    shorten,
)
from moebeam.schemas.errors import EmptyAnswer, JobFileError, ModelRejected, NotJson, SchemaViolation, abbreviate
from moebeam.schemas.store.storage import read_bytes

Formats: TypeAlias = Literal["assert", "annotate"]
Retriever: TypeAlias = Callable[[str], Json]

MAX_COUNTED_VIOLATIONS = 20

_SMALL_CHARACTERS = 16 << 10

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_MODEL_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class AnswerSchema:
    """A compiled output contract. Thread-safe and picklable; unpickling compiles it again.

    Attributes:
        document: the JSON Schema, for prompts and fingerprints; read-only.
        formats: whether `format` is asserted or only an annotation.
        source: file or class name for error messages.
        model: the pydantic model that also validates, if any.
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
        """Compile a schema; see `from_json` and `load`. `shipped` is pickled in place of `model`."""
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

        Equal documents of one source are compiled once per process and shared, because every request may bring the
        same tools. A repeated lookup takes microseconds.

        Args:
            document: `$schema` selects draft 4, 6, 7, 2019-09 or 2020-12; the default is 2020-12.
            formats: `assert` enforces `format`, `annotate` ignores it.
            source: name of the document in errors.
            retriever: returns other documents by absolute URI; picklable. Without one they are refused.
        Raises:
            JobFileError: not a schema, an unknown `$schema`, or a `$ref` that is broken or leaves the document.
        """
        if retriever is not None:
            return cls(document, formats=formats, source=source, retriever=retriever)
        try:
            text = json.dumps(document, ensure_ascii=False, allow_nan=False)
            compile_once = _compile_once if len(text) <= _SMALL_CHARACTERS else _compile_large_once
            return compile_once(text, formats, source)
        except (TypeError, ValueError, RecursionError):
            return cls(document, formats=formats, source=source)  # Raises the detailed error.

    @classmethod
    def load(
        cls,
        reference: str,
        formats: Formats = "assert",
        folder: str | Path | None = None,
        vet: Callable[[Json, Formats, str], object] | None = None,
    ) -> "AnswerSchema":
        """Compile the schema named in a job: a JSON file, or a pydantic model as `package.module:Class`.

        The pickle carries the source of the model's module (see `moebeam.schemas.contract.user_module`).

        Args:
            folder: the job file's, searched first for modules; the path of a JSON file is used as given.
            vet: called with the document, `formats` and the reference before the document is compiled.
        Raises:
            JobFileError: the file or class cannot be read, imported or shipped, or is not a schema.
        """
        if _MODEL_REFERENCE.fullmatch(reference):
            model, shipped = _import_model(reference, folder)
            document = _build_json_schema(model, reference)
            if vet is not None:
                vet(document, formats, reference)
            return cls(document, formats=formats, source=reference, model=model, shipped=shipped)
        document = _read_schema(reference)
        if vet is not None:
            vet(document, formats, reference)
        return cls(document, formats=formats, source=reference)

    @property
    def code_digest(self) -> str | None:
        """Digest of all shipped source of the model; None without a model or for an installed one.

        Validators may change while the JSON Schema stays the same.
        """
        return None if self._shipped is None else self._shipped.sources.digest

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.document, self.formats, self.source, self._shipped or self.model, self._retriever)

    def __repr__(self) -> str:
        return f"AnswerSchema(source={self.source!r}, formats={self.formats!r})"

    def check(self, text: str) -> Json:
        """Parse an answer and validate it.

        Returns:
            The parsed value; the last of duplicate keys wins, integers are exact. `keep_last_keys` gives its text.
        Raises:
            EmptyAnswer: empty or white space.
            NotJson: not one JSON value (RFC 8259), or one that readers cannot represent; says where.
            SchemaViolation: breaks the JSON Schema; names pointer, keyword, expected and found.
            ModelRejected: the pydantic model rejected it.
        """
        stripped, value = parse_answer(text)
        if not self._validator.is_valid(value):
            raise SchemaViolation(self._describe_violations(value))
        if self.model is not None:
            self._check_model(self.model, keep_last_keys(stripped, value))
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
                f"at {format_pointer(first['loc'])}: {model.__name__} expected: {shorten(first['msg'])}, "
                f"found {excerpt(first['input'])}" + (f" (and {more} more)" if more else "")
            ) from error
        except Exception as error:
            # A user's validator may raise anything; that rejects this answer and does not stop the job.
            raise ModelRejected(f"{model.__name__} raised {describe_error(error)}; found {shorten(text)}") from error


def parse_answer(text: str) -> tuple[str, Json]:
    """An answer without the white space around it, and its value.

    Raises:
        EmptyAnswer, NotJson: see `AnswerSchema.check`.
    """
    stripped = text.strip()
    if not stripped:
        raise EmptyAnswer(f"expected JSON, found {'an empty text' if not text else 'only white space'}")
    return stripped, parse_json(stripped)


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
    """Compile a document from its JSON text, which is hashable and immutable."""
    return AnswerSchema(cast("Json", json.loads(text)), formats=formats, source=source)


@lru_cache(maxsize=8)
def _compile_large_once(text: str, formats: Formats, source: str) -> AnswerSchema:
    """As `_compile_once`: a compiled schema takes some seventy times its text, so that few large ones are kept."""
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
    """A schema object repeats a key, so one constraint would be lost silently."""


def _refuse_duplicates(pairs: list[tuple[str, Json]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _DuplicateKey(abbreviate(key, MAX_EXCERPT))
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


def _build_json_schema(model: type[pydantic.BaseModel], reference: str) -> Json:
    try:
        return cast("Json", model.model_json_schema())
    except Exception as error:
        # Fields may define their own schema code, which may raise anything.
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
    if measure_depth(copy) > MAX_DEPTH:
        raise JobFileError(f"{source}: expected a schema of at most {MAX_DEPTH} levels, found more")
    if has_lone_surrogate(copy):
        raise JobFileError(f"{source}: expected Unicode text, found a lone surrogate in a string")
    excess = find_excess(copy)
    if excess is not None:
        raise JobFileError(f"{source}: {excess}")
    return copy


def _compile(document: Json, formats: Formats, source: str, retriever: Retriever | None) -> Validator:
    if not isinstance(document, Mapping | bool):
        raise JobFileError(
            f"{source}: at {format_pointer(())}: expected a JSON Schema (an object or a boolean), "
            f"found {excerpt(document)}"
        )
    refused: list[str] = []

    def refuse(uri: str) -> NoReturn:
        refused.append(uri)
        raise LookupError("nothing is ever fetched for a $ref")

    if retriever is None:
        _check_drafts(document, source)
    schema = cast("dict[str, Any] | bool", document)
    try:
        # `retriever or refuse` also disables the library's own HTTP client.
        return validator_for(schema, validate_formats=formats == "assert", retriever=cast("Any", retriever or refuse))
    except ValidationError as error:
        if isinstance(error.kind, ValidationErrorKind.Referencing):
            raise _reference_error(document, source, refused, error.message) from error
        raise JobFileError(f"{source}: not a JSON Schema: {describe_violation(error)}") from error
    except ValueError as error:
        raise JobFileError(f"{source}: this JSON Schema cannot be compiled: {shorten(str(error))}") from error


def _check_drafts(document: Json, source: str) -> None:
    num_declared = json.dumps(document).count('"$schema"')
    root = SchemaLocation(document, "", "")
    is_root_only = num_declared == int(root.get("$schema") is not None)
    for location in [root] if is_root_only else walk_schemas(root):
        declared = location.get("$schema")
        is_resource = not location.pointer or any(isinstance(location.get(name), str) for name in ("$id", "id"))
        if isinstance(declared, str) and is_resource and (read_draft(location.schema) is None or "://" not in declared):
            raise JobFileError(
                f"{source}: at {shorten(location.pointer + '/$schema')}: expected draft 4, 6, 7, 2019-09 or 2020-12 "
                f"(such as https://{list(DRAFTS)[-1]}), found {excerpt(declared)}"
            )


def _reference_error(document: Json, source: str, refused: Sequence[str], reason: str) -> JobFileError:
    """Find the unresolved reference; the library reports the reason but not the place."""
    references = References(document)
    for location in walk_schemas(references.root):
        for keyword in _REFERENCES:
            reference = location.get(keyword)
            if not isinstance(reference, str):
                continue
            at = f"{source}: at {shorten(f'{location.pointer}/{keyword}')}"
            target = reference.partition("#")[0]
            if target and any(uri.endswith(target) for uri in refused):
                return JobFileError(
                    f"{at}: expected a reference inside the document (nothing is ever fetched for a $ref), "
                    f"found {excerpt(reference)}; copy what it names into $defs"
                )
            if not target and references.find(reference, location.base) is None:
                return JobFileError(
                    f"{at}: expected a reference to something in the document, "
                    f"found {excerpt(reference)}, which does not exist"
                )
    return JobFileError(f"{source}: a reference cannot be followed: {shorten(reason)}")
