"""`type: MoebeamInfer` in Beam YAML; `beam_yaml_providers.yaml` beside it is the listing to include."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam

from moebeam.jobs.infer.infer import Infer
from moebeam.schemas.errors import JobFileError

PROVIDERS = Path(__file__).parent / "beam_yaml_providers.yaml"


def infer_in_yaml(job: Any = None, **sections: Any) -> beam.PTransform[Any, Any]:
    """Answers each row with a model, as a moebeam job.

    Args:
        job: path of a job file.
        sections: sections of a job file, in its place.
    """
    if job is not None and sections:
        raise JobFileError(f"MoebeamInfer: expected `job` or sections of one, found job and {', '.join(sections)}")
    return _InferNamed(Infer(job if job is not None else sections))


class _InferNamed(beam.PTransform[Any, Any]):
    """`Infer` with its outputs by name, as YAML refers to them."""

    def __init__(self, infer: Infer) -> None:
        super().__init__()
        self._infer = infer

    def expand(self, pcoll: Any) -> Any:
        answers = pcoll | self._infer
        named: Mapping[str, Any] = answers._asdict()
        return dict(named)
