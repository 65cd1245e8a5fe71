import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import DirectOptions, SetupOptions, StandardOptions
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from moebeam.jobs.check.beam_options import LOCAL_RUNNER, parse_beam_options
from moebeam.schemas.errors import JobFileError


def problem(*args: str) -> str:
    with pytest.raises(JobFileError) as raised:
        parse_beam_options(args)
    return str(raised.value)


@pytest.mark.parametrize("args", [[], ["--runner=DirectRunner"], ["--runner", "direct"], ["--runner=FnApiRunner"]])
def test_the_local_runner_is_the_fn_api_runner_and_never_prism(args: list[str]):
    options = parse_beam_options(args)
    assert options.view_as(StandardOptions).runner == LOCAL_RUNNER
    assert type(create_runner(LOCAL_RUNNER)) is FnApiRunner


def test_a_pipeline_with_these_options_runs_on_the_fn_api_runner():
    pipeline = beam.Pipeline(options=parse_beam_options([]))
    assert type(pipeline.runner) is FnApiRunner
    _ = pipeline | beam.Create([1, 2]) | beam.Map(lambda number: number + 1)
    assert pipeline.run().wait_until_finish() == "DONE"


@pytest.mark.parametrize("runner", ["FlinkRunner", "PortableRunner", "PrismRunner", "DataflowRunner", "flink", "a.b.C"])
def test_other_runners_are_kept(runner: str):
    assert parse_beam_options([f"--runner={runner}"]).view_as(StandardOptions).runner == runner


def test_an_unknown_runner_is_refused_with_the_nearest_one():
    assert problem("--runner=FlnkRunner") == "--runner=FlnkRunner: unknown runner; did you mean FlinkRunner?"
    assert "Beam knows DataflowRunner" in problem("--runner=zzz")


def test_values_reach_beam():
    options = parse_beam_options(
        ["--direct_num_workers", "2", "--direct_running_mode=multi_processing", "--labels=a=b"]
    )
    assert options.view_as(DirectOptions).direct_num_workers == 2
    assert options.get_all_options()["labels"] == ["a=b"]


def test_more_workers_in_memory_are_warned_about(caplog: pytest.LogCaptureFixture):
    parse_beam_options(["--direct_num_workers=2"])
    assert "no effect" in caplog.text
    caplog.clear()
    parse_beam_options(["--direct_num_workers=2", "--direct_running_mode=multi_threading"])
    parse_beam_options([])
    assert "no effect" not in caplog.text


@pytest.mark.parametrize(
    ("arg", "nearest"),
    [
        ("--direct_num_wrokers=2", "--direct_num_workers"),
        ("--direct-num-workers=2", "--direct_num_workers"),
        ("--flink_mastr=x", "--flink_master"),
        ("--limt", "--limit"),
        ("--jsno", "--json"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(arg: str, nearest: str):
    assert problem(arg) == f"{arg.partition('=')[0]}: unknown option; did you mean {nearest}?"


def test_an_abbreviated_option_is_refused():
    assert "--direct_num: unknown option" in problem("--direct_num", "2")


def test_every_unknown_option_is_named():
    assert len(problem("--zzzzzzzz=1", "--yyyyyyyy").splitlines()) == 2


@pytest.mark.parametrize(
    "args",
    [
        ["--direct_num_workers", "two"],
        ["--direct_running_mode=elsewhere"],
        ["--runner"],
        ["--gcs_custom_audit_entries=[1"],
        ["--gcs_custom_audit_entries=[1]"],
        ["second.toml"],
        ["-x"],
        ["--auto_unique_labels=yes"],
    ],
)
def test_an_ill_formed_value_or_stray_argument_is_a_job_file_error(args: list[str]):
    assert problem(*args)


@pytest.mark.parametrize(
    "args",
    [
        ["--s3_secret_access_key", "hunter2"],
        ["--s3_secret_access_key=hunter2"],
        ["--s3-secret-access-key=hunter2"],
        ["--s3_session_token=hunter2"],
        ["--s3_access_key_id=hunter2"],
        ["--azure_connection_string=hunter2"],
        ["--api_key=hunter2"],
        ["--password", "hunter2"],
        ["--job_endpoint=https://me:hunter2@example.org"],
        ["--job_endpoint", "https://me:hunter2@example.org"],
        ["--sdk_location=https://hunter2@example.org/x.whl"],
        ["--environment_options=HF_TOKEN=hunter2"],
        ['--environment_config={"env": {"API_KEY": "hunter2"}}'],
        ["--staging_location=https://example.org/x?sig=hunter2"],
    ],
)
def test_secrets_are_refused_and_never_shown(args: list[str]):
    message = problem(*args)
    assert "secret" in message
    assert "environment" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "arg",
    [
        "--temp_location=abfs://container@account.dfs.core.windows.net/x",
        "--temp_location=gs://secrets/token",
        "--dataflow_kms_key=projects/p/locations/l/keyRings/r/cryptoKeys/k",
        "--job_endpoint=localhost:8099",
        "--environment_options=process_command=/opt/boot",
    ],
)
def test_harmless_values_are_not_taken_for_secrets(arg: str):
    parse_beam_options([arg])


def test_the_main_session_is_never_saved():
    assert parse_beam_options([]).view_as(SetupOptions).save_main_session is False
    assert "--save_main_session" in problem("--save_main_session")


def test_streaming_is_refused():
    assert "batch" in problem("--streaming")
