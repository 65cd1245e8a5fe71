"""`moebeam run JOB.toml --reuse OUTPUT`: reuses an earlier run's answers and sends only the other requests.

Two requests are the same if tokens, tenant, sampling and their own options are equal. New rows, and rows whose prompt
changed with the template, are sent; rows that only moved are not. Everything else that affects answers, such as the
model's revision, must be equal in both jobs.
"""

from collections.abc import Mapping

from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.output.run_state import read_manifest
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import ReuseSource, fences_path, write_fences

_MUST_AGREE = ("[model]", "[output] schema", "[output] form", "[thinking] and [tools]", "[repair]", "tables version")
"""Parts of the identity that affect answers but are not part of a request."""


def prepare_reuse(output: str) -> ReuseSource:
    """Check that a run's answers can be reused.

    Raises:
        OutputError: no such run, it is incomplete, or its plan was cleaned.
    """
    source = read_record(output)
    manifest = read_manifest(source.layout)
    if manifest is None or manifest["status"] != "complete":
        raise OutputError(
            f"--reuse {output}: expected a finished run, found one with rows left; moebeam resume {output} first"
        )
    if not storage.exists(source.layout.plan_record):
        raise OutputError(
            f"--reuse {output}: expected the plan of the run, which says what was asked, found none: it was cleaned"
        )
    return ReuseSource(source.layout.output, source.run_id)


def check_reusable(reuse: ReuseSource, parts: Mapping[str, str]) -> None:
    """Compare a job's identity with that of the run to reuse.

    Raises:
        OutputError: something that affects answers differs; names it.
    """
    source = read_record(reuse.output)
    if changed := [name for name in _MUST_AGREE if parts.get(name) != source.parts.get(name)]:
        raise OutputError(
            f"--reuse {reuse.output}: expected a run whose answers this job would give too, found other: "
            f"{', '.join(changed)}; run without --reuse"
        )


def save_fences(layout: RunLayout, reuse: ReuseSource) -> None:
    """Write the earlier run's fences into a run's folder, unless present.

    Raises:
        OutputError: the earlier run's plan is gone.
        OSError: a store failed.
    """
    if storage.exists(fences_path(layout)):
        return
    try:
        write_fences(RunLayout(reuse.output), layout)
    except FileNotFoundError as error:
        raise OutputError(f"--reuse {reuse.output}: expected the plan of the run, found no {error}") from error
