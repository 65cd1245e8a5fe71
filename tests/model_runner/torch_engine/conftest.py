"""Checkpoints that the tests of the torch engine share, each built when it is first asked for."""

from functools import cache

import pytest
import torch

from tests.support.checkpoint_layouts import Layout, OpenLayout, save_layout


@pytest.fixture(scope="session")
def open_layout(tmp_path_factory: pytest.TempPathFactory) -> OpenLayout:
    """Gives the checkpoint of a name in `LAYOUTS`, on one thread, as more only wait for each other."""
    torch.set_num_threads(1)

    @cache
    def open_named(name: str) -> Layout:
        folder = tmp_path_factory.mktemp("layout")
        return Layout(folder, save_layout(folder, name))

    return open_named
