"""Endpoints as a job names them: addresses, limits and keys, found in its options, the profiles and the environment.

Before the first call: what is missing is named with its field or variable.
"""

import os
from urllib.parse import urlsplit

from moebeam.model_runner.openai_engine.client import EndpointSpec
from moebeam.model_runner.openai_engine.options import FallbackSection, OpenAIOptions, RemoteMode
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.redaction.guard_logs import guard_logs
from moebeam.schemas.redaction.known_secrets import learn_secret


def name_first_endpoint(config: EngineConfig, options: OpenAIOptions) -> FallbackSection:
    """The endpoint of `[model]` itself, in the form of those that follow it."""
    return FallbackSection.model_construct(
        provider=options.provider or "",
        name=config.name,
        base_url=options.base_url,
        api_key_variable=options.api_key_variable,
        max_concurrency=options.max_concurrency,
    )


def make_spec(config: EngineConfig, options: OpenAIOptions, wanted: FallbackSection, where: str) -> EndpointSpec:
    """Where and how one provider is asked; raises as `load_openai_runner` does."""
    profile = find_profile(wanted.provider or None)
    base_url = wanted.base_url or profile.base_url
    if base_url is None:
        raise EngineLoadError(f"{where}.base_url: expected the address of the {profile.name} server, found none")
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineLoadError(f"{where}.base_url: expected http(s)://HOST/..., found {base_url!r}")
    if parts.username or parts.password or (parts.query and not profile.takes_api_version):
        raise EngineLoadError(f"{where}.base_url: expected an address without credentials; name api_key_variable")
    model = wanted.name or config.name
    return EndpointSpec(
        profile=profile,
        model=model,
        base_url=base_url,
        max_concurrency=wanted.max_concurrency or profile.concurrency_for(model),
        timeout_s=options.timeout_s or profile.timeout_s,
        is_stream=_is_stream(options.mode, profile.mode),
        max_retries=options.max_retries,
        run_id=config.run_id,
        max_answer_s=options.max_answer_s,
        max_response_bytes=options.max_response_bytes,
    )


def find_secret(wanted: FallbackSection, where: str) -> str:
    """The key, from the environment; empty where the endpoint may be asked without one.

    From here on it stands in no log, no message and no answer of this process.
    """
    profile = find_profile(wanted.provider or None)
    if wanted.api_key_variable is None and not wanted.provider and wanted.base_url is not None:
        # An address without a named provider is not OpenAI's: its key does not go there.
        return ""
    variable = wanted.api_key_variable or profile.api_key_variable
    secret = os.environ.get(variable, "").strip()
    if not secret and (wanted.api_key_variable is not None or not profile.is_key_optional):
        raise EngineLoadError(
            f"{where}.api_key_variable: expected the key of {profile.name} in the environment variable {variable}, "
            "which is not set"
        )
    learn_secret(secret)
    guard_logs()
    return secret


def _is_stream(mode: RemoteMode, profile_mode: str) -> bool:
    return (profile_mode if mode == "auto" else mode) == "stream"
