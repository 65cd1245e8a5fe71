"""The options of the engine `fake` in `[model]`."""

from typing import ClassVar

from pydantic import Field

from moebeam.schemas.job.model import LocalModelSection


class FakeOptions(LocalModelSection):
    """`engine = "fake"`: scripted answers and failures, for tests and dry runs."""

    loader: ClassVar[str] = "moebeam.model_runner.fake_engine.runner:load_fake_runner"
    has_weights: ClassVar[bool] = False
    plans_prefixes: ClassVar[bool] = True

    engine: str = "fake"
    script: str | None = Field(default=None, description="JSON file of scripted answers and failures")

    @property
    def extra_files(self) -> dict[str, str]:
        """As of `ModelSection`: the script."""
        return {} if self.script is None else {"script": self.script}
