"""Checks engine arguments against the vLLM that is there, before it loads anything."""

import difflib
import typing
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def check_arguments(arguments: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Check arguments against those of this vLLM.

    Args:
        named: who set an argument, for messages.
    Raises:
        ValueError: names each argument that vLLM does not have, with near names, and each value of another type.
    """
    engine_args: Any = import_module("vllm").EngineArgs
    version: str = import_module("vllm").__version__
    known = [name for name in engine_args.__dataclass_fields__ if not name.startswith("_")]
    problems: list[str] = []
    for name, value in arguments.items():
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.6))
            problems.append(
                f"{named.get(name, 'engine')}: vLLM {version} has no argument {name!r}"
                + (f"; near names: {near}" if near else "")
            )
        elif (problem := _find_type_problem(engine_args, name, value)) is not None:
            problems.append(f"{named.get(name, 'engine')}: {name}: {problem}, found {value!r}")
    if problems:
        raise ValueError("; ".join(problems))


def _find_type_problem(engine_args: Any, name: str, value: Any) -> str | None:
    """Why a value cannot be an argument's; None if it can, or if only vLLM can tell."""
    pydantic: Any = import_module("pydantic")
    try:
        hint = typing.get_type_hints(engine_args)[name]
        adapter = pydantic.TypeAdapter(hint, config={"arbitrary_types_allowed": True})
    except Exception:  # a type that pydantic or this process does not know
        return None
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError as error:
        return "; ".join(dict.fromkeys(str(problem["msg"]) for problem in error.errors()[:3]))
    except Exception:  # a check of vLLM's own, which it repeats where it says more
        return None
    return None
