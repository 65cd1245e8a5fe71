"""Answer lengths, repairs and engine speed of an earlier run, for quotes; read from its ledger and manifest."""

from dataclasses import dataclass
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebeam.jobs.output.run_state import read_manifest
from moebeam.schemas.errors import FileDamaged, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.quote.quote import OutputForecast

_COLUMNS = (
    "attempt",
    "outcome",
    "cache_hit_tokens",
    "cache_miss_tokens",
    "visible_output_tokens",
    "reasoning_tokens",
)


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """Sums of a run's ledger, without wasted work and without attempts whose tokens are unknown.

    Attributes:
        engine: as named in the manifest.
        engine_s: engine seconds over all processes; None if the engine does not count them.
    """

    output: str
    engine: str
    num_requests: int
    computed_tokens: int
    output_tokens: int
    later_prompt_tokens: int
    later_hit_tokens: int
    engine_s: float | None

    def forecast(self) -> OutputForecast:
        """Forecast the output tokens of a similar job."""
        later = self.later_prompt_tokens
        return OutputForecast(
            tokens_a_request=self.output_tokens / self.num_requests,
            extra_prompt_tokens_a_request=later / self.num_requests,
            extra_hit_rate=self.later_hit_tokens / later if later else 0.0,
            basis=f"mean of the {self.num_requests:,} requests of {self.output}, repairs included",
        )

    def duration_s(self, num_computed_tokens: int, num_output_tokens: int) -> float | None:
        """Time the same engine needs for these tokens, at the run's mean rate."""
        num_tokens = self.computed_tokens + self.output_tokens
        if self.engine_s is None or num_tokens == 0:
            return None
        return self.engine_s * (num_computed_tokens + num_output_tokens) / num_tokens


def read_earlier_run(output: str) -> EarlierRun:
    """Read the run that `--like` names.

    Raises:
        OutputError: there is no finished run, or it never called the model.
    """
    layout = RunLayout(output.rstrip("/"))
    try:
        if (manifest := read_manifest(layout)) is None:
            raise OutputError(f"--like {output}: expected the output of a finished run, found no manifest")
        engine, counters = str(manifest["model"]["engine"]), cast("dict[str, float]", manifest["engine"])
        files = manifest["files"]["ledger"]
        tables = [_read_ledger(storage.join(layout.output, file["path"]), file["sha256"]) for file in files]
    except (FileDamaged, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(f"--like {output}: expected the manifest and ledger of a run, found: {error}") from error
    ledger = pa.concat_tables(tables) if tables else None
    if ledger is not None:
        ledger = ledger.filter(pc.not_equal(ledger.column("outcome"), pa.scalar("wasted")))
        if not ledger.num_rows:
            ledger = None
    if ledger is not None:
        ledger = ledger.filter(pc.is_valid(ledger.column("cache_miss_tokens")))
        ledger = ledger.filter(pc.is_valid(ledger.column("visible_output_tokens")))
        if not ledger.num_rows:
            raise OutputError(f"--like {output}: expected a run with counted tokens, found no usage in its ledger")
    num_requests = 0 if ledger is None else ledger.column("attempt").to_pylist().count(1)
    if ledger is None or num_requests == 0:
        raise OutputError(f"--like {output}: expected a run that asked the model, found no attempt in its ledger")
    later = ledger.filter(pc.greater(ledger.column("attempt"), pa.scalar(1, pa.int32())))
    seconds = [value for name, value in counters.items() if name.endswith("_s")]
    return EarlierRun(
        output=output,
        engine=engine,
        num_requests=num_requests,
        computed_tokens=_sum(ledger, "cache_miss_tokens"),
        output_tokens=_sum(ledger, "visible_output_tokens", "reasoning_tokens"),
        later_prompt_tokens=_sum(later, "cache_hit_tokens", "cache_miss_tokens"),
        later_hit_tokens=_sum(later, "cache_hit_tokens"),
        engine_s=sum(seconds) if seconds else None,
    )


def _read_ledger(path: str, sha256: str) -> pa.Table:
    with open_checked(path, sha256) as source:
        return pq.ParquetFile(source).read(columns=list(_COLUMNS))


def _sum(ledger: pa.Table, *names: str) -> int:
    return sum(int(pc.sum(ledger.column(name)).as_py() or 0) for name in names)
