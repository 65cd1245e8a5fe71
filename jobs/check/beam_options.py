"""Beam's pipeline options on moebeam's command line, checked before Beam sees them.

Beam only warns about unknown options, stores all options in the job as plain text, and by default first tries to
download a Go binary. Here unknown options and options that carry secrets are refused, and the local runner is explicit.
"""

import argparse
import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, SetupOptions, StandardOptions

from moebeam.schemas.errors import JobFileError

LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
OWN_OPTIONS = ("--set", "--limit", "--json", "--quiet", "--debug", "--help")

_LOCAL_NAMES = {"direct", "directrunner", "switchingdirectrunner", "fnapi", "fnapirunner"}
_SECRET_WORDS = (
    r"passw(?:or)?d|passwd|secret|token|api_?key|access_?key|private_?key|account_?key|credentials?|connection_?string"
    r"|signature"
)
_SECRET_NAME = re.compile(rf"(?:^|_)(?:{_SECRET_WORDS})(?:_|$)", re.IGNORECASE)
_SECRET_ASSIGNMENT = re.compile(rf"(?:{_SECRET_WORDS}|[?&]sig)[\"']?\s*[=:]\s*[^\s,}}]", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@:]*:[^/?#\s@]*@|https?://[^/?#\s@]+@", re.IGNORECASE)
_REFUSED = {
    "--save_main_session": "nothing of moebeam lives in __main__, so there is no session to save; leave it out",
    "--streaming": "moebeam runs batches; leave it out",
    "--help": "use moebeam run --help",
    "-h": "use moebeam run --help",
}

_LOGGER = logging.getLogger(__name__)


def parse_beam_options(args: Sequence[str]) -> PipelineOptions:
    """Parse Beam options strictly.

    Args:
        args: the command line without moebeam's own options, in Beam's snake_case.
    Returns:
        Options with the runner set, `LOCAL_RUNNER` by default.
    Raises:
        JobFileError: an option is unknown, ill-formed or not allowed; never shows values of secret options.
    """
    parser = _build_parser()
    problems = [problem for arg in args if (problem := _find_secret(arg)) is not None]
    problems += _find_unknown_options(args, _flags(parser))
    problems += [f"{flag}: {reason}" for flag, reason in _REFUSED.items() if flag in {_name(arg) for arg in args}]
    if problems:
        raise JobFileError("\n".join(problems))
    parser.error = _refuse
    try:
        _, leftover = parser.parse_known_args(list(args))
    except JobFileError:
        raise
    except (
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # some of Beam's types and actions raise the errors of json.loads
        raise JobFileError(f"a Beam option has an ill-formed value: {error}") from error
    if leftover:
        raise JobFileError(f"unexpected argument '{leftover[0]}'; a job file comes first, then options")
    return _set_runner(PipelineOptions(list(args)))


def runs_here(options: PipelineOptions) -> bool:
    """Whether workers are threads or processes on this machine, with its packages."""
    runner: str | None = options.view_as(StandardOptions).runner
    return runner == LOCAL_RUNNER


def _set_runner(options: PipelineOptions) -> PipelineOptions:
    standard = options.view_as(StandardOptions)
    runner: str | None = standard.runner
    standard.runner = _resolve_runner(runner)
    options.view_as(SetupOptions).save_main_session = False
    direct = options.view_as(DirectOptions)
    is_alone = direct.direct_running_mode in (None, "in_memory")
    if standard.runner == LOCAL_RUNNER and is_alone and direct.direct_num_workers != 1:
        _LOGGER.warning(
            "--direct_num_workers has no effect while --direct_running_mode is in_memory; "
            "add --direct_running_mode=multi_processing"
        )
    return options


def _resolve_runner(runner: str | None) -> str:
    """Resolve the runner to a name that Beam can create. Beam's DirectRunner would download Prism, a Go binary."""
    if runner is None or runner.lower() in _LOCAL_NAMES:
        return LOCAL_RUNNER
    if "." in runner:
        return runner
    names: list[str] = list(StandardOptions.KNOWN_RUNNER_NAMES)
    by_lower = {spelled: name for name in names for spelled in (name.lower(), name.lower().removesuffix("runner"))}
    if runner.lower() not in by_lower:
        near = difflib.get_close_matches(runner.lower(), by_lower, n=1)
        hint = f"did you mean {by_lower[near[0]]}?" if near else f"Beam knows {', '.join(names)}"
        raise JobFileError(f"--runner={runner}: unknown runner; {hint}")
    return runner


def _build_parser() -> argparse.ArgumentParser:
    """Build a parser of all options defined by loaded Beam modules."""
    parsers: list[argparse.ArgumentParser] = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=parsers.append)
    return parsers[0]


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    actions = parser._actions  # pyright: ignore[reportPrivateUsage]  # argparse lists its options nowhere else
    return [flag for action in actions for flag in action.option_strings if flag.startswith("--")]


def _name(arg: str) -> str:
    return arg.partition("=")[0]


def _find_secret(arg: str) -> str | None:
    name, _, value = arg.partition("=") if arg.startswith("--") else ("a value", "", arg)
    plain = name.lstrip("-").replace("-", "_")
    is_option = arg.startswith("--")
    if is_option and _SECRET_NAME.search(plain):
        reason = "is an option that carries a secret"
    elif _SECRET_ASSIGNMENT.search(value) or _URL_CREDENTIALS.search(value):
        reason = "holds a secret"
    else:
        return None
    return (
        f"{name}: {reason}, and Beam stores its options in plain text with the job; give it through the environment "
        "of the workers or the platform's own identity instead"
    )


def _find_unknown_options(args: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    for arg in args:
        name = _name(arg)
        is_flag = name.startswith("--") and name not in known and name not in _REFUSED
        if is_flag and not _SECRET_NAME.search(name.lstrip("-").replace("-", "_")):
            candidates = [*known, *OWN_OPTIONS]
            spelled = name.replace("-", "_").replace("__", "--", 1)
            near = difflib.get_close_matches(spelled, candidates, n=1)
            yield f"{name}: unknown option{f'; did you mean {near[0]}?' if near else ''}"


def _refuse(message: str) -> NoReturn:
    raise JobFileError(message)
