"""What the packages may import, and that their one name is moebeam's own."""

import ast
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("schemas", "model_runner", "transforms", "pipelines", "jobs")
BEAM_FILES = (
    "jobs/check/beam_options.py",
    "jobs/deploy/**",
    "jobs/infer/*.py",
    "jobs/notebook/beam_in_notebooks.py",
    "jobs/run/launch.py",
    "jobs/run/local_runner.py",
    "jobs/run/main_job.py",
    "jobs/run/pipeline_thread.py",
    "jobs/run/private_runner.py",
    "model_runner/run_inference/handler.py",
    "pipelines/infer/*.py",
    "pipelines/main_job.py",
    "transforms/*/step.py",
    "transforms/beam/*.py",
)
"""Only these load Beam, themselves or through others."""

IMPORTERS: dict[str, tuple[str, ...]] = {
    "apache_beam": BEAM_FILES,
    "duckdb": ("jobs/demo/run_demo.py", "transforms/read/sources/*.py"),
    "deltalake": ("transforms/publish/lakehouse/delta_table.py", "transforms/read/sources/lake_tables.py"),
    "genai_prices": ("jobs/reports/price_cross_check.py",),
    "openai": (
        "model_runner/openai_engine/*.py",
        "model_runner/openai_engine/batch/*.py",
        "model_runner/openai_engine/transport/*.py",
    ),
    "pyiceberg": ("transforms/publish/lakehouse/iceberg_table.py", "transforms/read/sources/lake_tables.py"),
    "pandas": ("jobs/notebook/*.py",),
    "prometheus_client": ("jobs/serve/metrics.py",),
    "starlette": ("jobs/serve/*.py",),
    "safetensors": ("model_runner/torch_engine/weights/*.py",),
    "torch": (
        "model_runner/grammar/constraint.py",
        "model_runner/torch_engine/**",
        "model_runner/transformers_engine/*",
    ),
    "transformers": (
        "model_runner/checkpoint/model_config.py",
        "model_runner/torch_engine/layers/rotary.py",
        "model_runner/transformers_engine/*",
    ),
}
"""The only files that name a library in an import, wherever in the file."""


def source_files() -> Iterator[str]:
    for package in PACKAGES:
        yield from (str(path.relative_to(ROOT)) for path in sorted((ROOT / package).rglob("*.py")))


def matches(file: str, patterns: tuple[str, ...]) -> bool:
    # A star of `fnmatch` crosses folders; one star here stays inside of one.
    return any(
        fnmatchcase(file, pattern) and ("**" in pattern or file.count("/") == pattern.count("/"))
        for pattern in patterns
    )


def imported_libraries(file: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.fixture(scope="module")
def libraries() -> Mapping[str, set[str]]:
    """The libraries that each file imports."""
    return {file: imported_libraries(file) for file in source_files()}


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_is_imported_only_where_it_may_be(libraries: Mapping[str, set[str]], library: str) -> None:
    importers = [file for file, found in libraries.items() if library in found]
    assert importers
    assert [file for file in importers if not matches(file, IMPORTERS[library])] == []


def test_modules_without_beam_load_none() -> None:
    files = [file for file in source_files() if not matches(file, BEAM_FILES)]
    assert min(Counter(file.partition("/")[0] for file in files if not file.startswith("pipelines/")).values()) > 10
    modules = ["moebeam." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]
    code = """
import importlib, json, sys
for module in json.load(sys.stdin):
    importlib.import_module(module)
    if "apache_beam" in sys.modules:
        sys.exit(f"{module} loads Beam")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(modules), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_one_name_belongs_to_moebeam_alone() -> None:
    assert set(packages_distributions().get("moebeam", [])) == {"moebeam"}, "install the project: pip install -e ."


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_is_imported_by_the_one_name_only(package: str) -> None:
    spec = importlib.util.find_spec(f"moebeam.{package}")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / package / "__init__.py"
    assert "moebeam" not in packages_distributions().get(package, [])
