"""Batch inference for DeepSeek-class mixture-of-experts models as an Apache Beam workflow.

The public names are those of `__all__`, described in `docs/api.md`. Each is imported from where it is defined when it
is first used, so that `import moebeam` loads neither Beam nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebeam.jobs.check.job_file import load_job
    from moebeam.jobs.infer.infer import Infer
    from moebeam.jobs.notebook.run_job import run_job
    from moebeam.model_runner.protocol import EngineConfig
    from moebeam.model_runner.run_inference.handler import MoebeamModelHandler
    from moebeam.pipelines.infer.infer_rows import Answers
    from moebeam.schemas.errors import (
        ClusterUnavailable,
        CommitError,
        EngineContractError,
        EngineLoadError,
        EngineUnavailable,
        FileDamaged,
        InputChanged,
        InputPatternError,
        JobError,
        JobFileError,
        JobInterrupted,
        MissingExtra,
        MoebeamError,
        OutputError,
        PipelineFailed,
        RowError,
        RunStopped,
        TableCommitFailed,
    )
    from moebeam.schemas.job.sections import Job
    from moebeam.schemas.tables import LEDGER_SCHEMA, PLAN_SCHEMA, READ_SCHEMA, RESULT_SCHEMA, TABLES_VERSION
    from moebeam.transforms.answer.step import AnswerShards
    from moebeam.transforms.plan.step import PlanShards
    from moebeam.transforms.publish.step import PublishRun
    from moebeam.transforms.read.step import ReadPrompts
    from moebeam.transforms.render.step import RenderPrompts

    __version__: str

__all__ = [
    "LEDGER_SCHEMA",
    "PLAN_SCHEMA",
    "READ_SCHEMA",
    "RESULT_SCHEMA",
    "TABLES_VERSION",
    "AnswerShards",
    "Answers",
    "ClusterUnavailable",
    "CommitError",
    "EngineConfig",
    "EngineContractError",
    "EngineLoadError",
    "EngineUnavailable",
    "FileDamaged",
    "Infer",
    "InputChanged",
    "InputPatternError",
    "Job",
    "JobError",
    "JobFileError",
    "JobInterrupted",
    "MissingExtra",
    "MoebeamError",
    "MoebeamModelHandler",
    "OutputError",
    "PipelineFailed",
    "PlanShards",
    "PublishRun",
    "ReadPrompts",
    "RenderPrompts",
    "RowError",
    "RunStopped",
    "TableCommitFailed",
    "__version__",
    "load_job",
    "run_job",
]

_MODULES = {
    "AnswerShards": "transforms.answer.step",
    "Answers": "pipelines.infer.infer_rows",
    "EngineConfig": "model_runner.protocol",
    "Infer": "jobs.infer.infer",
    "Job": "schemas.job.sections",
    "LEDGER_SCHEMA": "schemas.tables",
    "MoebeamModelHandler": "model_runner.run_inference.handler",
    "PLAN_SCHEMA": "schemas.tables",
    "PlanShards": "transforms.plan.step",
    "PublishRun": "transforms.publish.step",
    "READ_SCHEMA": "schemas.tables",
    "RESULT_SCHEMA": "schemas.tables",
    "ReadPrompts": "transforms.read.step",
    "RenderPrompts": "transforms.render.step",
    "TABLES_VERSION": "schemas.tables",
    "load_job": "jobs.check.job_file",
    "run_job": "jobs.notebook.run_job",
}
"""Where the public names are defined; the others are errors."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value: object = import_module("importlib.metadata").version(__name__)
    else:
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'schemas.errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
