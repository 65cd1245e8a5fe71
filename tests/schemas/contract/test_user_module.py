import json
import linecache
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from apache_beam.internal.cloudpickle import cloudpickle

from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.user_module import MAX_SOURCE_BYTES, ModuleSources, ShippedClass, import_user_module
from moebeam.schemas.errors import JobFileError, ModelRejected
from tests.support.paths import ROOT

MODEL = """
import pydantic
from words_of_this_test import CATEGORIES

class Ticket(pydantic.BaseModel):
    category: str

    @pydantic.field_validator("category")
    @classmethod
    def check_category(cls, value: str) -> str:
        import late_words_of_this_test
        if value == "crash":
            return late_words_of_this_test.crash()
        if value not in CATEGORIES:
            raise ValueError(f"expected one of {CATEGORIES}")
        return value
"""
FILES = {
    "models_of_this_test.py": MODEL,
    "words_of_this_test.py": "CATEGORIES = ['bug', 'question']\n",
    "late_words_of_this_test.py": "def crash():\n    raise KeyError('oops')  # this very line\n",
    "package_of_this_test/__init__.py": "",
    "package_of_this_test/inner/models.py": "from ..base import Base\nimport words_of_this_test\nclass Ticket(Base):\n"
    "    words: int = len(words_of_this_test.CATEGORIES)\n",
    "package_of_this_test/base.py": "import pydantic\nclass Base(pydantic.BaseModel):\n    label: str\n",
    "package_of_this_test/unused.py": "def broken(:\n",
    "unrelated.py": "raise RuntimeError('not imported by anyone')",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the user's modules; what was imported is gone afterwards."""
    before = set(sys.modules)
    folder = tmp_path / "job"
    write(folder, FILES)
    yield folder
    for name in set(sys.modules) - before:
        if "of_this_test" in name:
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def sources_of(name: str, folder: Path) -> ModuleSources:
    found = ModuleSources.collect(import_user_module(name, folder))
    assert found is not None
    return found


def worker(script: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a script in a fresh process to which only moebeam is importable."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-I", "-c", prelude + script]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, cwd="/")


def test_module_beside_the_job_file_is_found_and_the_path_is_left_alone(folder: Path) -> None:
    before = list(sys.path)
    module = import_user_module("package_of_this_test.inner.models", folder)
    assert module.Ticket(label="x").words == 2
    assert sys.path == before
    assert import_user_module("package_of_this_test.inner.models", folder) is module


def test_folder_without_the_module_leaves_it_to_python(folder: Path) -> None:
    assert import_user_module("json", folder) is json
    for place in (folder, ROOT):
        assert import_user_module("moebeam.schemas.errors", place).JobFileError is JobFileError
    with pytest.raises(JobFileError, match="module 'no_such_of_this_test' cannot be imported: ModuleNotFoundError"):
        import_user_module("no_such_of_this_test", folder)


def test_only_what_the_module_imports_from_its_folder_is_shipped(folder: Path) -> None:
    names = [file.name for file in sources_of("models_of_this_test", folder).files]
    assert names == ["late_words_of_this_test", "models_of_this_test", "words_of_this_test"]
    names = [file.name for file in sources_of("package_of_this_test.inner.models", folder).files]
    assert names == [
        "package_of_this_test",
        "package_of_this_test.base",
        "package_of_this_test.inner",
        "package_of_this_test.inner.models",
        "package_of_this_test.unused",
        "words_of_this_test",
    ]


def test_module_on_the_path_is_shipped_from_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    module = import_user_module("models_of_this_test")
    sources = ModuleSources.collect(module)
    assert sources is not None and len(sources.files) == 3
    assert pickle.loads(pickle.dumps(sources)).restore() is module


def test_installed_modules_are_not_shipped() -> None:
    for module in (json, pytest, sys, sys.modules["moebeam.schemas.errors"], sys.modules["__main__"]):
        assert ModuleSources.collect(module) is None


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("reference", ["models_of_this_test:Ticket", "package_of_this_test.inner.models:Ticket"])
def test_same_process_gets_the_same_class(folder: Path, dumps: object, reference: str) -> None:
    schema = AnswerSchema.load(reference, folder=folder)
    again = pickle.loads(dumps(schema))  # type: ignore[operator]
    assert again.model is schema.model
    assert again.code_digest == schema.code_digest is not None


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_fresh_process_validates_without_the_files(folder: Path, dumps: object) -> None:
    """As on a worker: nothing but moebeam is importable, and the job's folder is gone."""
    schemas = [
        AnswerSchema.load("models_of_this_test:Ticket", folder=folder),
        AnswerSchema.load("package_of_this_test.inner.models:Ticket", folder=folder),
    ]
    pickled = dumps(schemas)  # type: ignore[operator]
    folder.rename(folder.with_name("gone"))
    found = worker(
        """
import pickle, traceback
from moebeam.schemas.errors import ModelRejected
before = list(sys.path)
ticket, inner = pickle.loads(sys.stdin.buffer.read())
print(ticket.check('{"category": "bug"}'), inner.check('{"label": "x"}'), inner.model(label="x").words)
for answer in ("joke", "crash"):
    try:
        ticket.check('{"category": "%s"}' % answer)
    except ModelRejected as error:
        print(error)
        trace = "".join(traceback.format_exception(error))
print("this very line" in trace, sys.path == before, len(sys.meta_path) - len(set(map(id, sys.meta_path))))
again = pickle.loads(pickle.dumps(ticket))
print(again.model is ticket.model)
""",
        pickled,
    )
    assert found.stderr == b""
    assert found.stdout.decode().splitlines() == [
        "{'category': 'bug'} {'label': 'x'} 2",
        "at /category: Ticket expected: Value error, expected one of ['bug', 'question'], found \"joke\"",
        'Ticket raised KeyError: \'oops\'; found {"category": "crash"}',
        "True True 0",
        "True",
    ]


def test_installed_module_of_equal_source_is_preferred(folder: Path) -> None:
    pickled = pickle.dumps(sources_of("package_of_this_test.inner.models", folder))
    for change, loader in (("", "SourceFileLoader"), ("\n# changed", "_MemoryLoader")):
        with (folder / "words_of_this_test.py").open("a") as file:
            file.write(change)
        found = worker(
            f"sys.path.append({str(folder)!r})\nimport pickle\n"
            "print(type(pickle.loads(sys.stdin.buffer.read()).restore().__loader__).__name__)",
            pickled,
        )
        assert (found.stdout.decode().strip(), found.stderr) == (loader, b"")


def test_worker_that_lacks_a_dependency_says_so(folder: Path) -> None:
    write(folder, {"models_of_this_test.py": "import json\nimport no_such_of_this_test\n"})
    digest_free = ModuleSources("models_of_this_test", ())
    with pytest.raises(JobFileError, match="No module named 'no_such_of_this_test'; what it imports must be installed"):
        import_user_module("models_of_this_test", folder)
    with pytest.raises(JobFileError, match="'models_of_this_test' cannot be imported"):
        digest_free.restore()


@pytest.mark.parametrize("source", ["raise RuntimeError('at import')", "raise SystemExit(0)", "def", "x = '\0'"])
def test_code_that_fails_at_import_is_a_job_file_error_and_leaves_nothing(folder: Path, source: str) -> None:
    write(folder, {"models_of_this_test.py": source})
    for _ in range(2):
        with pytest.raises(JobFileError, match="module 'models_of_this_test' cannot be imported: "):
            import_user_module("models_of_this_test", folder)
        assert "models_of_this_test" not in sys.modules
    write(folder, {"models_of_this_test.py": "right = True"})
    assert import_user_module("models_of_this_test", folder).right


def test_edited_module_is_read_afresh_and_the_old_one_goes_on(folder: Path) -> None:
    old = AnswerSchema.load("models_of_this_test:Ticket", folder=folder)
    write(folder, {"words_of_this_test.py": "CATEGORIES = ['praise']\n"})
    new = AnswerSchema.load("models_of_this_test:Ticket", folder=folder)
    assert old.code_digest != new.code_digest
    for _ in range(2):
        for schema, good, bad in ((old, "bug", "praise"), (new, "praise", "bug")):
            again = pickle.loads(pickle.dumps(schema))
            assert again.model is schema.model
            assert again.check(json.dumps({"category": good}))
            with pytest.raises(ModelRejected):
                again.check(json.dumps({"category": bad}))


def test_two_classes_of_one_package_share_its_modules(folder: Path) -> None:
    inner = import_user_module("package_of_this_test.inner.models", folder)
    base = import_user_module("package_of_this_test.base", folder)
    assert issubclass(inner.Ticket, base.Base)
    sources = ModuleSources.collect(base)
    assert sources is not None and sources.restore() is base


def test_name_that_is_taken_is_refused(folder: Path) -> None:
    write(folder, {"moebeam/__init__.py": "", "types.py": ""})
    for name in ("moebeam", "types"):
        with pytest.raises(JobFileError, match="has the name of a module of moebeam's or Python's own; rename it"):
            import_user_module(name, folder)
    sys.modules["models_of_this_test"] = ModuleType("models_of_this_test")
    with pytest.raises(JobFileError, match="another module 'models_of_this_test' is imported already"):
        import_user_module("models_of_this_test", folder)
    with pytest.raises(JobFileError, match="expected a source file, found none"):
        ModuleSources.collect(sys.modules["models_of_this_test"])


def test_package_named_like_a_folder_of_the_checkout_is_the_users(folder: Path) -> None:
    """Launcher and worker both have the checkout's root on their path, where Python finds folders of these names."""
    packages = ("schemas", "model_runner", "transforms", "pipelines", "jobs", "tests")
    for package in packages:
        write(
            folder,
            {
                f"{package}/__init__.py": "",
                f"{package}/review.py": "import pydantic\nfrom transforms import stars\n"
                f"class Review(pydantic.BaseModel):\n    stars: int = stars.MOST\n    package: str = {package!r}\n",
                "transforms/stars.py": "MOST = 5\n",
            },
        )
    use = "print(*(schema.model() for schema in schemas), schemas[0].check('{}'), sep='\\n')\n"
    launcher = f"""
import pickle
from moebeam.schemas.contract.answer_schema import AnswerSchema
schemas = [AnswerSchema.load(f"{{package}}.review:Review", folder={str(folder)!r}) for package in {packages}]
sys.stdout.buffer.write(pickle.dumps(schemas))
sys.stdout = sys.stderr
"""
    launched = worker(launcher + use)
    folder.rename(folder.with_name("gone"))
    arrived = worker("import pickle\nschemas = pickle.loads(sys.stdin.buffer.read())\n" + use, launched.stdout)
    expected = [f"stars=5 package={package!r}" for package in packages] + ["{}"]
    assert launched.stderr.decode().splitlines() == arrived.stdout.decode().splitlines() == expected
    assert arrived.stderr == b""


def test_sources_that_are_too_large_are_refused(folder: Path) -> None:
    for name in ("a", "b", "c"):
        write(folder, {f"package_of_this_test/{name}.py": "#" * (MAX_SOURCE_BYTES // 3)})
    with pytest.raises(
        JobFileError, match=r"expected at most 1,048,576 bytes in 1,000 files .*package_of_this_test; move"
    ):
        import_user_module("package_of_this_test.base", folder)
    write(folder, {"models_of_this_test.py": "#" * (MAX_SOURCE_BYTES + 1)})
    with pytest.raises(JobFileError, match="found more than 1,048,576 bytes"):
        import_user_module("models_of_this_test", folder)


def test_extension_module_beside_it_is_refused(folder: Path) -> None:
    (folder / "words_of_this_test.py").rename(folder / "words_of_this_test.abi3.so")
    with pytest.raises(JobFileError, match=r"expected Python source in .*abi3\.so, found an extension module; install"):
        import_user_module("models_of_this_test", folder)


def test_source_in_another_encoding_is_shipped_and_an_unknown_one_refused(folder: Path) -> None:
    (folder / "models_of_this_test.py").write_bytes("# coding: latin-1\nword = 'é'\n".encode("latin-1"))
    assert import_user_module("models_of_this_test", folder).word == "é"
    (folder / "models_of_this_test.py").write_bytes(b"word = '\xe9'\n")
    with pytest.raises(JobFileError, match=r"expected Python source in .* found SyntaxError: invalid or missing enc"):
        import_user_module("models_of_this_test", folder)


def test_traceback_shows_the_source_as_it_was_loaded(folder: Path) -> None:
    module = import_user_module("late_words_of_this_test", folder)
    (folder / "late_words_of_this_test.py").write_text("nothing\nelse\n")
    linecache.checkcache()
    with pytest.raises(KeyError) as caught:
        module.crash()
    assert "raise KeyError('oops')  # this very line" in "".join(traceback.format_exception(caught.value))


def test_shipped_class_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(JobFileError, match=r"was shipped with a class 'Missing\.Inner', found none here"):
        ShippedClass(sources_of("models_of_this_test", folder), "Missing.Inner").restore()


@pytest.mark.integration
def test_class_of_main_is_left_to_cloudpickle() -> None:
    """A notebook's own class: no file, but cloudpickle ships it by value."""
    script = """
import pickle, pydantic
from apache_beam.internal.cloudpickle import cloudpickle
from moebeam.schemas.contract.answer_schema import AnswerSchema
class Ticket(pydantic.BaseModel):
    label: str
schema = AnswerSchema.load("__main__:Ticket")
assert schema.code_digest is None
sys.stdout.buffer.write(cloudpickle.dumps(schema))
"""
    made = worker(script)
    assert made.returncode == 0, made.stderr
    found = worker('import pickle\nprint(pickle.loads(sys.stdin.buffer.read()).check(\'{"label": "x"}\'))', made.stdout)
    assert found.stdout == b"{'label': 'x'}\n"
