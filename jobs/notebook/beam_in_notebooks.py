"""Beam in a notebook's kernel, kept from its interactive parts."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from apache_beam import pipeline
from apache_beam.utils import interactive_utils


@contextmanager
def beam_outside_ipython() -> Generator[None]:
    """Let Beam build and run pipelines during the block as it does outside of IPython.

    There it labels steps by the cell's number, to which end it imports its own data frames; with pandas 3 that import
    fails (`DataFrame` has no attribute 'first'), and without it nothing here would use them.
    """
    modules: tuple[Any, ...] = (interactive_utils, pipeline)
    before = [module.is_in_ipython for module in modules]
    for module in modules:
        module.is_in_ipython = lambda: False
    try:
        yield
    finally:
        for module, is_in_ipython in zip(modules, before, strict=True):
            module.is_in_ipython = is_in_ipython
