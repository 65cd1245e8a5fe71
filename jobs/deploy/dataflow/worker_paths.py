"""Which paths of a job workers open by themselves: on a service they must lead to an object store.

Schema, tools and price book are read by the launcher and travel in the pipeline, so these may lie on its disk.
"""

from collections.abc import Iterator

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store.object_store import is_local


def local_paths(job: Job, reuse: str | None = None) -> Iterator[str]:
    """Say of every path that workers need and that lies on the launcher's disk what to do about it.

    Args:
        reuse: output of the earlier run whose answers are taken over, if any.
    """
    for key, path in _read_by_workers(job, reuse):
        if is_local(path):
            yield (
                f"{key}: {path!r} lies on this machine's disk, which Dataflow's workers cannot see; "
                "name a copy in an object store, such as gs://bucket/folder"
            )


def _read_by_workers(job: Job, reuse: str | None) -> Iterator[tuple[str, str]]:
    yield "[input] path", job.input.path
    yield "[output] path", job.output.path
    if job.model.path is not None:
        yield "[model] path", job.model.path
    elif not job.model.is_remote:
        yield "[model] path (left out)", str(CHECKPOINT_PATH)
    yield from ((f"[model] {key}", path) for key, path in job.model.extra_files.items())
    if reuse is not None:
        yield "--reuse", reuse
