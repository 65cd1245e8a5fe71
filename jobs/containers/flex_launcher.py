"""What a flex template runs: its parameters become the command line of `moebeam run`.

Dataflow starts the launcher's container with the parameters of `metadata.json` beside Beam's own options, among them
`--template_location`: the command stages the pipeline and ends, and the service starts the job from what it wrote.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, cast

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.console.console import print_error, stderr_console
from moebeam.jobs.containers.worker_start import secret_variables
from moebeam.schemas.errors import JobError, JobFileError

WORKER_IMAGE_VARIABLE = "MOEBEAM_WORKER_IMAGE"
"""Image of the workers that the launcher's image was built for."""

PARAMETERS: Mapping[str, str] = {
    "input": "input.path",
    "output": "output.path",
    "max_cost": "limits.max_cost",
    "max_input_tokens": "limits.max_input_tokens",
    "max_output_tokens": "limits.max_output_tokens",
    "max_requests": "limits.max_requests",
    "deadline": "limits.deadline",
}
"""Parameters that stand for a key of the job file."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def main() -> NoReturn:
    try:
        os.environ.update(secret_variables(os.environ))
        command = run_arguments(sys.argv[1:], os.environ)
    except JobError as error:
        print_error(stderr_console(), str(error))
        sys.exit(error.exit_code)
    sys.exit(run_command(command))


def run_arguments(args: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of `moebeam run` for the template's parameters; what is no parameter is passed on to Beam.

    Empty parameters, as a form sends them, are left out.

    Raises:
        JobFileError: there is no job file, or `overrides` is neither one override nor a JSON list of them.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    for name in ("job_file", "limit", "reuse", "overrides", *PARAMETERS):
        parser.add_argument(f"--{name}")
    try:
        known, beam_args = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise JobFileError(str(error)) from error
    given = cast("dict[str, str]", {name: value for name, value in vars(known).items() if value})
    if "job_file" not in given:
        raise JobFileError("--job_file: missing; name the job file, such as gs://bucket/job.toml")
    command = ["run", given["job_file"]]
    sets = [f"{key}={_toml(given[name])}" for name, key in PARAMETERS.items() if name in given]
    for override in [*sets, *_overrides(given.get("overrides", ""))]:
        command += ["--set", override]
    for name in ("limit", "reuse"):
        if name in given:
            command += [f"--{name}", given[name]]
    image = environment.get(WORKER_IMAGE_VARIABLE)
    if image and not any(arg.partition("=")[0] == "--sdk_container_image" for arg in beam_args):
        beam_args.append(f"--sdk_container_image={image}")
    return [*command, *beam_args]


def _toml(value: str) -> str:
    """A parameter as a TOML value: a number as it is, all else in quotes, because TOML would read a time as one."""
    return value if _NUMBER.fullmatch(value) else json.dumps(value)


def _overrides(text: str) -> list[str]:
    if not text.startswith("["):
        return [text] if text else []
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise JobFileError(f"--overrides: expected section.key=value or a JSON list of such texts: {error}") from error
    assert isinstance(found, list), "a JSON text that begins with a bracket is a list"
    texts = cast("list[object]", found)
    if not all(isinstance(override, str) for override in texts):
        raise JobFileError(f"--overrides: expected a JSON list of texts, found {text}")
    return cast("list[str]", texts)


if __name__ == "__main__":
    main()
