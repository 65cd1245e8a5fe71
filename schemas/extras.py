"""Packages that `pip install moebeam` leaves out because few jobs need them, and the error that names the mend."""

from importlib.util import find_spec

from moebeam.schemas.errors import MissingExtra

EXTRAS: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "safetensors"),
    "pandas": ("pandas",),
    "duckdb": ("duckdb",),
    "prices": ("genai_prices",),
    "serve": ("starlette", "uvicorn", "python_multipart", "prometheus_client"),
    "iceberg": ("pyiceberg",),
    "delta": ("deltalake",),
}
"""The modules that each extra of pyproject.toml brings; object stores have their own, see `store/storage.py`."""


def require_extra(extra: str, needed_for: str) -> None:
    """Check that an extra is installed, without importing it.

    Args:
        needed_for: what needs it, in the words of the job file or the command.
    Raises:
        MissingExtra: with the command that installs it.
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtra(
            f"{needed_for}: expected {', '.join(missing)} to be installed, found none; pip install 'moebeam[{extra}]'"
        )
