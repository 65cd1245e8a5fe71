"""Checks the paths that workers open: on a remote service they must be in an object store.

The launcher reads schema, tools and price book and ships them in the pipeline, so these may be on its disk.
"""

from collections.abc import Iterator

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store.object_store import is_local


def find_local_paths(job: Job, reuse: str | None = None) -> Iterator[str]:
    """Find paths on the launcher's disk that workers need; says for each what to do.

    Args:
        reuse: output of the earlier run whose answers are reused, if any.
    """
    for key, path in _read_by_workers(job, reuse):
        if is_local(path):
            yield (
                f"{key}: {path!r} lies on this machine's disk, which Dataflow's workers cannot see; "
                "name a copy in an object store, such as gs://bucket/folder"
            )


def _read_by_workers(job: Job, reuse: str | None) -> Iterator[tuple[str, str]]:
    yield from (("[input] path", path) for path in job.input.paths)
    yield "[output] path", job.output.path
    if job.model.path is not None:
        yield "[model] path", job.model.path
    elif not job.model.is_remote:
        yield "[model] path (left out)", str(CHECKPOINT_PATH)
    yield from ((f"[model] {key}", path) for key, path in job.model.extra_files.items())
    if reuse is not None:
        yield "--reuse", reuse
