"""Engine configurations for tests, written in one line."""

from typing import Any

from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.job.model import ENGINE_OPTIONS, ModelSection, load_options


def engine_config(
    engine: str, path: str = "", name: str = "m", revision: str = "r", run_id: str = "", **options: Any
) -> EngineConfig:
    """A configuration as it stands, unchecked: what engines refuse themselves can be given to them."""
    declared = load_options(engine) if engine in ENGINE_OPTIONS else ModelSection
    return EngineConfig(declared.model_construct(engine=engine, **options), path, name, revision, run_id)
