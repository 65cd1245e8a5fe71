"""Checks that constrained answers are valid: `python -m benchmarks.constrained --schemas DIR --json OUT.json`.

DIR holds `*.json`, each `{"schema": ...}`, as MaskBench has them; of its `tests` (`{"data": ..., "valid": ...}`)
each instance is given to the grammar, token by token. Each schema becomes a grammar as a job's would
(`enforceable_schema`), and answers are drawn under it: random logits, as of a model with random weights, under the
engines' own masks, over a synthetic vocabulary of 129,280 tokens or the demo's. jsonschema-rs validates the complete
answers with formats asserted. So that answers end, tokens that begin with a closing quote or bracket and the end token
are preferred, the more the longer an answer is; white space between JSON tokens is avoided. Only tokens that the mask
allows are drawn.

OUT has for each schema `status` (`compiled`, `relaxed`: `keywords` names what is left to validation, `unsupported`:
`reason`), what is `narrowed`, `valid_refused` and `invalid_accepted` of its instances, `valid` of `attempts`, and
`completed`, the answers that ended before `--max-tokens`; then totals, compile time and mask time. `--attempts 0` only
compiles and asks for the instances. Exit code 0, or 2 where no schema could be read.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from llguidance.numpy import fill_next_token_bitmask

from benchmarks.report import machine_facts
from benchmarks.synthetic_tokenizer import DEEPSEEK_VOCAB_SIZE, END_TOKEN_ID, synthetic_tokenizer
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler
from moebeam.model_runner.grammar.json_grammar import enforceable_schema, json_schema_grammar
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import InvalidGrammar, JobFileError, RowError

TOKENIZERS = ("synthetic", "demo")

_CLOSING = ('"', "}", "]")
_MIN_CLOSING_SHARE = 0.1


@dataclass(slots=True)
class SchemaResult:
    """What became of one schema.

    Attributes:
        keyword: the first of `keywords`, which hold pointer, keyword and reason of all that is left to validation.
        reason: why it is unsupported.
        num_narrowed: keywords by which valid values or spellings are left out.
        valid_refused, invalid_accepted: of the file's instances, as validation judges them.
        failures: the first answers that completed and are not valid, with the reason.
        rewrite_ms, compile_ms: making the grammar's text, and its automata for the tokenizer.
    """

    file: str
    status: str
    attempts: int = 0
    completed: int = 0
    valid: int = 0
    keyword: str | None = None
    keywords: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    reason: str | None = None
    num_narrowed: int = 0
    instances: int = 0
    valid_refused: int = 0
    invalid_accepted: int = 0
    failures: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    rewrite_ms: float | None = None
    compile_ms: float | None = None


class RandomModel:
    """Random logits under a mask, over one tokenizer."""

    def __init__(self, name: str, vocab_size: int) -> None:
        """Read the vocabulary.

        Raises:
            ValueError: the vocabulary is too small.
        """
        if name == "demo":
            self.tokenizer = tokenizers.Tokenizer.from_file(str(CHECKPOINT_PATH / "tokenizer.json"))
        else:
            self.tokenizer = synthetic_tokenizer(vocab_size)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self._compiler = ConstraintCompiler(self.tokenizer, self.vocab_size, [END_TOKEN_ID])
        texts = self.tokenizer.decode_batch([[token_id] for token_id in range(self.vocab_size)])
        self._is_closing = np.array([text.startswith(_CLOSING) for text in texts])
        self._is_closing[END_TOKEN_ID] = True
        self._is_space = np.array([bool(text) and text.isspace() for text in texts])
        self._mask = np.zeros((1, (self.vocab_size + 31) // 32), dtype=np.int32)
        self.mask_ms: list[float] = []
        # The first compilation of a tokenizer also prepares its slices, once.
        self.draw(self.compile(json_schema_grammar({"type": "string"})), np.random.default_rng(0), 16)
        self.mask_ms.clear()

    def compile(self, grammar: str) -> Constraint:
        """The constraint of a new answer."""
        return self._compiler.compile(grammar)

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether a grammar allows a text, token by token, and an end after it."""
        constraint = self.compile(grammar)
        try:
            for token_id in self.tokenizer.encode(text, add_special_tokens=False).ids:
                constraint.accept(token_id)
        except RowError:
            return False
        return constraint.can_end

    def draw(self, constraint: Constraint, rng: np.random.Generator, max_tokens: int) -> tuple[str, bool]:
        """An answer, and whether it came to its end."""
        token_ids: list[int] = []
        while len(token_ids) < max_tokens:
            forced = constraint.find_forced_token_ids()
            token_id = forced[0] if forced else self._pick(self._allowed(constraint), rng, len(token_ids) / max_tokens)
            if token_id == END_TOKEN_ID:
                return self._text(token_ids), True
            constraint.accept(token_id)
            token_ids.append(token_id)
            if constraint.is_over:
                return self._text(token_ids), True
        return self._text(token_ids), False

    def _text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _allowed(self, constraint: Constraint) -> npt.NDArray[np.int64]:
        start = time.perf_counter()
        fill_next_token_bitmask(constraint.matcher, self._mask, 0)
        self.mask_ms.append((time.perf_counter() - start) * 1000)
        if constraint.failure is not None:
            raise constraint.failure
        return np.flatnonzero(np.unpackbits(self._mask[0].view(np.uint8), bitorder="little"))

    def _pick(self, allowed: npt.NDArray[np.int64], rng: np.random.Generator, progress: float) -> int:
        words = allowed[~self._is_space[allowed]]
        candidates = words if words.size else allowed
        closing = candidates[self._is_closing[candidates]]
        if closing.size and rng.random() < _MIN_CLOSING_SHARE + 4 * progress:
            # The end wins over other closing tokens, and a bare one over those that go on.
            candidates = closing[closing == END_TOKEN_ID] if END_TOKEN_ID in closing and progress > 0.1 else closing
        return int(candidates[rng.integers(candidates.size)])


def check_schema(
    file: str,
    schema: Json,
    model: RandomModel,
    *,
    attempts: int,
    max_tokens: int,
    seed: int,
    instances: Sequence[Json] = (),
) -> SchemaResult:
    """Draw answers under one schema and validate them; give its grammar instances of which validation judges too."""
    try:
        contract = AnswerSchema.from_json(schema, formats="assert", source=file)
        start = time.perf_counter()
        enforceable = enforceable_schema(schema)
        grammar = json_schema_grammar(enforceable.document)
        rewrite_ms = (time.perf_counter() - start) * 1000
        start = time.perf_counter()
        constraint = model.compile(grammar)
        compile_ms = (time.perf_counter() - start) * 1000
    except (InvalidGrammar, JobFileError) as error:
        return SchemaResult(file, "unsupported", reason=str(error))
    found = SchemaResult(
        file,
        "relaxed" if enforceable.relaxed else "compiled",
        attempts,
        keyword=enforceable.relaxed[0].keyword if enforceable.relaxed else None,
        keywords=[_describe(relaxation) for relaxation in enforceable.relaxed],
        num_narrowed=len(enforceable.narrowed),
        rewrite_ms=rewrite_ms,
        compile_ms=compile_ms,
    )
    for value in instances:
        text = json.dumps(value, ensure_ascii=False)
        is_valid, is_accepted = _keeps(contract, text), model.accepts(grammar, text)
        found.instances += 1
        found.valid_refused += is_valid and not is_accepted
        found.invalid_accepted += is_accepted and not is_valid
    for attempt in range(attempts):
        rng = np.random.default_rng([seed, attempt])
        try:
            text, is_complete = model.draw(constraint if attempt == 0 else model.compile(grammar), rng, max_tokens)
        except RowError as error:
            found.failures.append({"text": "", "reason": str(error)})
            continue
        if not is_complete:
            continue
        found.completed += 1
        try:
            contract.check(text)
            found.valid += 1
        except RowError as error:
            found.failures.append({"text": text[:500], "reason": str(error)})
    return found


def _keeps(contract: AnswerSchema, text: str) -> bool:
    try:
        contract.check(text)
    except RowError:
        return False
    return True


def _describe(relaxation: Relaxation) -> dict[str, str]:
    return {"pointer": relaxation.pointer, "keyword": relaxation.keyword, "reason": relaxation.reason}


def read_schemas(folder: Path) -> tuple[dict[str, tuple[Json, list[Json]]], dict[str, str]]:
    """The schemas of a folder by file name, in order, with their instances; and why other files cannot be read."""
    schemas: dict[str, tuple[Json, list[Json]]] = {}
    problems: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document: object = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(document, dict) or "schema" not in document:
                raise ValueError('expected {"schema": ...}, found no key `schema`')
            instances = [test["data"] for test in document.get("tests", ()) if "data" in test]
            schemas[path.name] = document["schema"], instances
        except (OSError, ValueError, RecursionError) as error:
            problems[path.name] = f"{type(error).__name__}: {error}"
    return schemas, problems


def compute_totals(results: Sequence[SchemaResult], mask_ms: Sequence[float]) -> dict[str, Any]:
    """Sums and percentiles over all schemas."""
    exact = [found for found in results if found.status == "compiled"]
    completed = sum(found.completed for found in exact)
    return {
        "num_schemas": len(results),
        **{status: sum(found.status == status for found in results) for status in STATUSES},
        "narrowed": sum(found.num_narrowed > 0 for found in results),
        "instances": sum(found.instances for found in results),
        "valid_refused": sum(found.valid_refused for found in results),
        "valid_refused_unnamed": sum(found.valid_refused for found in results if not found.num_narrowed),
        "invalid_accepted": sum(found.invalid_accepted for found in results),
        "invalid_accepted_unnamed": sum(found.invalid_accepted for found in exact),
        "attempts": sum(found.attempts for found in results),
        "completed": sum(found.completed for found in results),
        "valid": sum(found.valid for found in results),
        "compiled_completed": completed,
        "compiled_valid": sum(found.valid for found in exact),
        "compiled_valid_share": sum(found.valid for found in exact) / completed if completed else None,
        "rewrite_ms": _percentiles([found.rewrite_ms for found in results if found.rewrite_ms is not None]),
        "compile_ms": _percentiles([found.compile_ms for found in results if found.compile_ms is not None]),
        "mask_ms": _percentiles(mask_ms),
        "num_masks": len(mask_ms),
    }


STATUSES = ("compiled", "relaxed", "unsupported")


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p99 = np.percentile(np.array(values), [50, 99])
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4), "max": round(max(values), 4)}


def result_lines(totals: dict[str, Any], results: Sequence[SchemaResult]) -> list[str]:
    """The figures to read, and every schema that falls short."""
    lines = [
        f"{totals['num_schemas']} schemas: "
        + ", ".join(f"{totals[status]} {status}" for status in STATUSES)
        + f"; {totals['completed']} of {totals['attempts']} answers complete, {totals['valid']} of them valid",
        f"{totals['narrowed']} narrowed; of {totals['instances']} instances {totals['valid_refused']} valid refused "
        f"({totals['valid_refused_unnamed']} where nothing is narrowed), {totals['invalid_accepted']} invalid accepted "
        f"({totals['invalid_accepted_unnamed']} where nothing is relaxed)",
        f"not relaxed: {totals['compiled_valid']} of {totals['compiled_completed']} complete answers valid",
    ]
    for name in ("rewrite_ms", "compile_ms", "mask_ms"):
        if totals[name] is not None:
            lines.append(f"{name}: " + ", ".join(f"{part} {value:.3f}" for part, value in totals[name].items()))
    for found in results:
        if found.status == "unsupported":
            lines.append(f"{found.file}: unsupported: {found.reason}")
        elif found.status == "compiled" and found.failures:
            lines.append(f"{found.file}: {found.failures[0]['reason']}")
    return lines


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constrained", description="Schemas under grammars.")
    parser.add_argument("--schemas", type=Path, required=True, help='folder of *.json, each {"schema": ...}')
    parser.add_argument("--json", type=Path, required=True, help="file to write the result to")
    parser.add_argument("--attempts", type=int, default=10, help="answers for each schema")
    parser.add_argument("--max-tokens", type=int, default=2_000, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="synthetic")
    parser.add_argument("--vocab-size", type=int, default=DEEPSEEK_VOCAB_SIZE, help="of the synthetic tokenizer")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check all schemas of a folder; 2 if there is none that can be read."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.attempts < 0 or args.max_tokens < 1 or args.seed < 0:
        parser.error("--max-tokens: expected at least 1; --attempts and --seed: expected at least 0")
    schemas, problems = read_schemas(args.schemas)
    for file, problem in problems.items():
        print(f"{file}: cannot be read: {problem}", file=sys.stderr)
    if not schemas:
        print(f"{args.schemas}: expected *.json files with schemas, found none", file=sys.stderr)
        return 2
    try:
        model = RandomModel(args.tokenizer, args.vocab_size)
    except ValueError as error:
        parser.error(f"--vocab-size: {error}")
    options = {"attempts": args.attempts, "max_tokens": args.max_tokens, "seed": args.seed}
    results = [
        check_schema(file, schema, model, instances=instances, **options)
        for file, (schema, instances) in schemas.items()
    ]
    totals = compute_totals(results, model.mask_ms)
    print("\n".join(result_lines(totals, results)))
    found = {
        "benchmark": "constrained",
        "totals": totals,
        "schemas": [asdict(result) for result in results],
        "unreadable": [{"file": file, "reason": problem} for file, problem in problems.items()],
        "options": {**options, "tokenizer": args.tokenizer, "vocab_size": model.vocab_size},
        "machine": machine_facts(),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
