"""Checkpoints that the tests of the torch engine share, each built when it is first asked for."""

from functools import cache

import pytest
import torch

from tests.support.models.checkpoint_layouts import Layout, OpenLayout, save_layout


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """More only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def open_layout(tmp_path_factory: pytest.TempPathFactory) -> OpenLayout:
    """Gives the checkpoint of a name in `LAYOUTS`."""

    @cache
    def open_named(name: str) -> Layout:
        folder = tmp_path_factory.mktemp("layout")
        return Layout(folder, save_layout(folder, name))

    return open_named
