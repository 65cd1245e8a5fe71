"""The files beside the programs: what Flink, Maven and Kubernetes read must agree with the code."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from moebeam.jobs.deploy.flink.worker_pool import DEFAULT_ADDRESS
from moebeam.jobs.deploy.job_service import KEEP_WORKERS_MS
from moebeam.schemas.errors import ClusterUnavailable
from tests.support.flink.cluster import ClusterSize, LocalCluster
from tests.support.flink.java_commands import FlinkFiles, job_server
from tests.support.paths import ROOT

FOLDER = ROOT / "jobs" / "deploy" / "flink"


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value).lower()
    return flat


@pytest.fixture
def standalone() -> dict[str, str]:
    return flattened(yaml.safe_load((FOLDER / "conf" / "config.yaml").read_text()))


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "kubernetes" / "cluster.yaml").read_text())


def test_a_cluster_on_kubernetes_is_configured_as_a_standalone_one(
    standalone: dict[str, str], kubernetes: dict[str, Any]
) -> None:
    there = {name: value.lower() for name, value in kubernetes["spec"]["flinkConfiguration"].items()}
    sizes = {name for name in standalone if name.endswith(".process.size")}
    assert {name: value for name, value in standalone.items() if name not in sizes} == {
        name: value for name, value in there.items() if name != "taskmanager.memory.managed.size"
    }


def test_a_job_is_restarted_only_after_its_dead_workers_are_forgotten(standalone: dict[str, str]) -> None:
    backoff = standalone["restart-strategy.exponential-delay.initial-backoff"]
    assert int(backoff.removesuffix(" s")) * 1000 > KEEP_WORKERS_MS
    assert float(standalone["restart-strategy.exponential-delay.jitter-factor"]) == 0


def test_the_sidecar_listens_where_its_pods_jobs_look(kubernetes: dict[str, Any]) -> None:
    containers = kubernetes["spec"]["taskManager"]["podTemplate"]["spec"]["containers"]
    (pool,) = [container for container in containers if container["name"] == "worker-pool"]
    assert pool["command"] == ["python", "-m", "moebeam.jobs.deploy.flink.worker_pool"]
    assert f"--address={DEFAULT_ADDRESS}" in pool["args"]
    assert f"--environment_config={DEFAULT_ADDRESS}" in (FOLDER / "kubernetes" / "cluster.yaml").read_text()


def test_the_job_server_of_kubernetes_gets_the_arguments_of_the_local_one(tmp_path: Path) -> None:
    server, service = yaml.safe_load_all((FOLDER / "kubernetes" / "job-server.yaml").read_text())
    (container,) = server["spec"]["template"]["spec"]["containers"]
    local = job_server(FlinkFiles(tmp_path, tmp_path), job_manager_address="a:1", job_port=1, artifacts=tmp_path)
    names = {argument.partition("=")[0] for argument in local if argument.startswith("--") and "add-" not in argument}
    assert {argument.partition("=")[0] for argument in container["args"]} - names == {"--job-host"}
    assert {port["port"] for port in service["spec"]["ports"]} == {port["containerPort"] for port in container["ports"]}


def test_maven_makes_the_jars_that_a_cluster_looks_for(tmp_path: Path) -> None:
    pom = (FOLDER / "pom.xml").read_text()
    root = ElementTree.fromstring(pom)
    files = FlinkFiles(tmp_path, tmp_path)
    made = {f"{element.text}.jar" for element in root.iter() if element.tag.endswith("finalName")}
    made |= {Path(element.text or "").name for element in root.iter() if element.tag.endswith("outputFile")}
    assert made == {files.job_server_jar.name, files.runner_jar.name}
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert all(f"COPY target/{name} " in dockerfile for name in made)
    assert re.search(r"FROM flink:1\.19\.", dockerfile)


def test_a_missing_part_of_flink_is_named_with_its_origin(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "cluster", FlinkFiles(tmp_path / "flink", tmp_path / "jars"), ClusterSize())
    with pytest.raises(ClusterUnavailable, match=r"flink/lib: expected a part of a Flink 1\.19 distribution"):
        cluster.start()
    (tmp_path / "flink" / "lib").mkdir(parents=True)
    (tmp_path / "flink" / "bin").mkdir()
    (tmp_path / "flink" / "bin" / "bash-java-utils.jar").touch()
    with pytest.raises(
        ClusterUnavailable, match=r"moebeam-flink-runner\.jar: expected what mvn -f jobs/deploy/flink/pom"
    ):
        cluster.start()
    assert not (tmp_path / "cluster").exists()
