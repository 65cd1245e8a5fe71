"""Finds a user's Python module beside the job file and ships it to workers as source text.

Used by `schemas/contract/answer_schema.py`, whose pydantic model may be defined in such a module. The launcher reads
the sources once (`ModuleSources.collect`) before the run. They are part of the pickled schema, and `restore` makes them
importable from memory in any process, without writing files or changing `sys.path`. Installed modules (standard
library, site-packages, moebeam) are not shipped: workers have their own.

Only source is shipped. A package that reads data files, or imports other modules by computed names, must be installed
on the workers. Why not cloudpickle: `docs/adr/0008-user-module-on-workers.md`.
"""

import ast
import importlib.util
import linecache
import os
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module, invalidate_caches
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Final
from zipimport import zipimporter

from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.contract.wording import describe_error
from moebeam.schemas.errors import JobFileError

MAX_SOURCE_BYTES = 1 << 20
"""Most source text shipped for one module; every validating stage carries it."""
MAX_SOURCE_FILES = 1_000

_OWN_PACKAGE = "moebeam"
_OWN_ROOT = Path(__file__).absolute().parents[3]
"""The folder that `moebeam` is imported from."""


def import_user_module(name: str, folder: str | Path | None = None) -> ModuleType:
    """Import a module by its dotted name, from `folder` if it is there, else as Python would.

    Args:
        folder: a local folder, such as the job file's. A module found in it is reloaded if its source has changed.
    Raises:
        JobFileError: no such module, its code raised, or another module has its name.
    """
    root = None if folder is None else Path(folder).absolute()
    if root is not None and _locate(name, root) is not None:
        if not _is_reserved(_top(name)):
            return _read_sources(name, root).restore()
        if _top(name) != _OWN_PACKAGE or root.resolve() != _OWN_ROOT.resolve():
            raise JobFileError(
                f"module {name!r} of {root} has the name of a module of moebeam's or Python's own; rename it"
            )
    with _LOCK:
        invalidate_caches()
        try:
            return import_module(name)
        except (Exception, SystemExit) as error:
            # Importing runs the user's code, which may raise anything.
            raise JobFileError(f"module {name!r} cannot be imported: {describe_error(error)}") from error


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module's source; `path` is where it was read, for tracebacks."""

    name: str
    is_package: bool
    path: str
    text: str


@dataclass(frozen=True)
class ModuleSources:
    """Source text of a module and of the modules in its folder that it needs."""

    module: str
    files: tuple[SourceFile, ...]

    @classmethod
    def collect(cls, module: ModuleType) -> "ModuleSources | None":
        """Read the sources that a worker needs to import a module.

        These are its file, or its whole top-level package, plus everything imported from the same folder. Imports are
        found in the source text, so those inside functions count.

        Returns:
            None for installed modules, which workers have, and for `__main__`, whose classes cloudpickle ships by
            value.
        Raises:
            JobFileError: a source cannot be read or parsed, or all together are too large.
        """
        name = module.__name__
        loader: object = getattr(module, "__loader__", None)
        if isinstance(loader, _MemoryLoader):
            return replace(loader.sources, module=name)
        file: str | None = getattr(module, "__file__", None)
        if name == "__main__" or name in sys.builtin_module_names or isinstance(loader, zipimporter):
            return None
        if file is None:
            raise JobFileError(f"module {name!r} cannot be shipped to workers: expected a source file, found none")
        path = Path(file).absolute()
        if _top(name) == _OWN_PACKAGE or _is_installed(path):
            return None
        depth = name.count(".") + hasattr(module, "__path__")
        root = path.parents[min(depth, len(path.parents) - 1)]
        if _locate(name, root) != path:
            raise JobFileError(
                f"module {name!r} cannot be shipped to workers: expected a .py file of its name, found {path}"
            )
        sources = _read_sources(name, root)
        with _LOCK:
            _FOUND[sources.digest, name] = module
        return sources

    @cached_property
    def digest(self) -> str:
        """Digest of the source texts; independent of their paths."""
        return fingerprint([[file.name, file.is_package, file.text] for file in self.files])

    def restore(self) -> ModuleType:
        """Import the module, from memory unless the same sources are installed here.

        Within a process, the same sources always give the same module object. Sources of the same name from an
        earlier job are replaced; their classes keep working.

        Raises:
            JobFileError: the module's code raised, or another module of this process has its name.
        """
        with _LOCK:
            found = _FOUND.get((self.digest, self.module))
            if found is not None and sys.modules.get(self.module) is found:
                return found
            try:
                if not _is_found_unchanged(self):
                    return _FINDER.load(self)
                return _FOUND.setdefault((self.digest, self.module), import_module(self.module))
            except JobFileError:
                raise
            except (Exception, SystemExit) as error:
                # Importing runs the user's code, which may raise anything.
                hint = "; what it imports must be installed, here and on every worker"
                raise JobFileError(
                    f"module {self.module!r} cannot be imported: {describe_error(error)}"
                    + hint * isinstance(error, ImportError)
                ) from error


@dataclass(frozen=True, slots=True)
class ShippedClass:
    """A class of a shipped module, by its dotted path in it; pickled in place of the class."""

    sources: ModuleSources
    path: str

    def restore(self) -> type:
        """Import the class; raises as `ModuleSources.restore` does, and if the module lacks the class here."""
        found: object = self.sources.restore()
        for name in self.path.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, type):
            raise JobFileError(
                f"module {self.sources.module!r} was shipped with a class {self.path!r}, found none here"
            )
        return found


class _MemoryLoader(ExecutionLoader):
    def __init__(self, file: SourceFile, sources: ModuleSources) -> None:
        self.file = file
        self.sources = sources

    def get_source(self, fullname: str) -> str:
        return self.file.text

    def get_filename(self, fullname: str) -> str:
        return self.file.path

    def is_package(self, fullname: str) -> bool:
        return self.file.is_package


class _MemoryFinder(MetaPathFinder):
    """Finds shipped modules only; one per process.

    `sys.modules` has the version of a module that was restored last; `_modules` keeps the others.
    """

    def __init__(self) -> None:
        self._loaders: dict[str, _MemoryLoader] = {}
        self._modules: defaultdict[str, dict[str, ModuleType]] = defaultdict(dict)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        loader = self._loaders.get(fullname)
        if loader is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname,
            loader.file.path,
            loader=loader,
            # Empty, so that an import that fails on a worker fails on the launcher too.
            submodule_search_locations=[] if loader.file.is_package else None,
        )

    def load(self, sources: ModuleSources) -> ModuleType:
        current = self._loaders.get(sources.module)
        if current is not None and current.sources.digest == sources.digest:
            return import_module(sources.module)
        tops = {_top(file.name) for file in sources.files}
        self._set_aside(tops)
        for name, module in sys.modules.items():
            if _top(name) in tops:
                raise JobFileError(
                    f"module {sources.module!r} cannot be imported: another module {name!r} is imported already, "
                    f"from {getattr(module, '__file__', None)}; rename one of them"
                )
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for file in sources.files:
            self._loaders[file.name] = _MemoryLoader(file, sources)
            # Without a modification time, linecache keeps the entry even if the file does not exist.
            linecache.cache[file.path] = (len(file.text), None, file.text.splitlines(keepends=True), file.path)
        sys.modules.update(self._modules[sources.digest])
        try:
            return import_module(sources.module)
        except BaseException:
            self._set_aside(tops)
            raise

    def _set_aside(self, tops: set[str]) -> None:
        for name in [name for name in self._loaders if _top(name) in tops]:
            del self._loaders[name]
        for name, module in list(sys.modules.items()):
            loader: object = getattr(module, "__loader__", None)
            if _top(name) in tops and isinstance(loader, _MemoryLoader):
                self._modules[loader.sources.digest][name] = sys.modules.pop(name)


_LOCK: Final = RLock()
_FINDER: Final = _MemoryFinder()
_FOUND: Final[dict[tuple[str, str], ModuleType]] = {}
"""Modules that Python itself found, by name and the digest of their sources at that time."""


def _read_sources(name: str, root: Path) -> ModuleSources:
    files: dict[str, SourceFile] = {}
    num_bytes = 0
    tops = [_top(name)]
    for top in tops:
        for file in _read_package(top, root):
            files[file.name] = file
            num_bytes += len(file.text.encode())
            if num_bytes > MAX_SOURCE_BYTES or len(files) > MAX_SOURCE_FILES:
                raise JobFileError(
                    f"module {name!r} cannot be shipped to workers: expected at most {MAX_SOURCE_BYTES:,} bytes in "
                    f"{MAX_SOURCE_FILES:,} files of source, found more in {root / top}; move it to a module or a "
                    "package of its own, or install it here and on the workers"
                )
            tops.extend(other for other in sorted(_imports(file.text)) if other not in tops and _is_beside(other, root))
    return ModuleSources(name, tuple(files[key] for key in sorted(files)))


def _read_package(top: str, root: Path) -> Iterator[SourceFile]:
    """Read a top-level module, or all sources of a top-level package, with or without `__init__.py`."""
    binaries = [path for suffix in EXTENSION_SUFFIXES if (path := root / f"{top}{suffix}").exists()]
    module = root / f"{top}.py"
    if not (root / top / "__init__.py").is_file() and (module.is_file() or binaries):
        if binaries:
            raise _build_error(top, binaries[0], "an extension module")
        yield _read_source(top, module, is_package=False)
        return
    for folder, subfolders, names in os.walk(root / top):
        subfolders[:] = sorted(name for name in subfolders if name.isidentifier() and name != "__pycache__")
        package = ".".join(Path(folder).relative_to(root).parts)
        initial = Path(folder, "__init__.py")
        if "__init__.py" in names:
            yield _read_source(package, initial, is_package=True)
        else:
            yield SourceFile(package, True, str(initial), "")
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and stem.isidentifier() and stem != "__init__":
                yield _read_source(f"{package}.{stem}", Path(folder, name), is_package=False)
            binary = next((ending for ending in EXTENSION_SUFFIXES if name.endswith(ending)), None)
            if binary is not None and f"{package}.{name.removesuffix(binary)}" in sys.modules:
                raise _build_error(f"{package}.{name.removesuffix(binary)}", Path(folder, name), "an extension module")


def _read_source(name: str, path: Path, *, is_package: bool) -> SourceFile:
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            raise _build_error(name, path, f"more than {MAX_SOURCE_BYTES:,} bytes")
        return SourceFile(name, is_package, str(path), importlib.util.decode_source(path.read_bytes()))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        # SyntaxError: an unknown encoding declared in the first lines.
        raise _build_error(name, path, describe_error(error)) from error


def _build_error(name: str, path: Path, found: str) -> JobFileError:
    return JobFileError(
        f"module {name!r} cannot be shipped to workers: expected Python source in {path}, found {found}; "
        "install it here and on the workers"
    )


def _imports(text: str) -> set[str]:
    """Top-level names of all modules that a source imports, anywhere in it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return set()  # Importing it raises the error.
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(_top(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(_top(node.module))
    return found


def _is_beside(top: str, root: Path) -> bool:
    """Whether an imported module is also the user's: in the same folder and not loaded from elsewhere."""
    if _is_reserved(top):
        return False
    loaded = sys.modules.get(top)
    if loaded is not None and not _is_shipped(loaded):
        places = [file] if (file := getattr(loaded, "__file__", None)) else list(getattr(loaded, "__path__", ()))
        beside = root.resolve()
        if not any(Path(place).resolve().is_relative_to(beside) and not _is_installed(Path(place)) for place in places):
            return False
    return (
        _locate(top, root) is not None
        or any((root / f"{top}{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
        or any((root / top).glob("*.py"))
    )


def _is_found_unchanged(sources: ModuleSources) -> bool:
    """Whether Python itself would find all of the modules here, with the same source."""
    try:
        spec = importlib.util.find_spec(_top(sources.module))
    except (ImportError, ValueError):
        return False  # The module loaded under this name does not say where it came from.
    if spec is None or isinstance(spec.loader, _MemoryLoader):
        return False
    folders = spec.submodule_search_locations
    place = spec.origin or next(iter(folders or ()), "")
    root = Path(place).absolute().parents[1 if spec.origin and folders is not None else 0]
    return all(_has_source(file, root) for file in sources.files)


def _has_source(file: SourceFile, root: Path) -> bool:
    path = _locate(file.name, root)
    place: str | None = getattr(sys.modules.get(file.name), "__file__", None)
    if place is not None and (path is None or Path(place).resolve() != path.resolve()):
        return False
    if path is None:
        return file.is_package and not file.text
    try:
        return importlib.util.decode_source(path.read_bytes()) == file.text
    except (OSError, UnicodeDecodeError, SyntaxError):
        return False


def _locate(name: str, root: Path) -> Path | None:
    """The source file of a module below a folder."""
    base = root.joinpath(*name.split("."))
    return next((path for path in (base / "__init__.py", base.with_name(f"{base.name}.py")) if path.is_file()), None)


def _is_reserved(top: str) -> bool:
    """Whether every worker has a module of this name, which a user's module cannot replace."""
    return top == _OWN_PACKAGE or top in sys.stdlib_module_names


def _is_shipped(module: ModuleType) -> bool:
    return isinstance(getattr(module, "__loader__", None), _MemoryLoader)


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or an installed package; editable installs do not count."""
    folders = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(map(path.is_relative_to, folders))


def _top(name: str) -> str:
    return name.partition(".")[0]
