"""The images: made of a lock that agrees with the one of the tests, and of all that they need."""

import re
from pathlib import Path

from packaging.requirements import Requirement

from moebeam.jobs.containers.worker_start import BOOT
from tests.support.clean_environment import CONTAINERS, image_entry_point, image_variables
from tests.support.paths import ROOT

DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()


def pins(lock: Path) -> dict[str, str]:
    lines = (line.split(";")[0].strip() for line in lock.read_text().splitlines())
    return {
        (requirement := Requirement(line)).name: str(requirement.specifier)
        for line in lines
        if line and not line.startswith("#")
    }


def test_the_images_install_the_versions_that_the_tests_run_with() -> None:
    images, tested = pins(CONTAINERS / "requirements.lock"), pins(ROOT / "requirements-integration.lock")
    assert set(images) <= set(tested)
    assert {name: tested[name] for name in images} == images


def test_the_images_hold_what_workers_and_launcher_need_and_no_tools() -> None:
    images = pins(CONTAINERS / "requirements.lock")
    assert {"apache-beam", "torch", "gcsfs", "s3fs", "google-cloud-secret-manager", "google-cloud-storage"} <= set(
        images
    )
    assert not {"pytest", "ruff", "basedpyright", "hypothesis"} & set(images)


def test_beam_and_python_of_the_images_are_those_of_the_lock() -> None:
    images = pins(CONTAINERS / "requirements.lock")
    beam = re.search(r"^ARG BEAM=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert beam is not None
    assert images["apache-beam"] == f"=={beam[1]}"
    assert "--from=beam /opt/apache/beam" in DOCKERFILE
    assert BOOT.startswith("/opt/apache/beam/")


def test_the_cpu_image_leaves_out_nothing_but_cuda() -> None:
    left_out = re.search(r"grep -Ev '(.*)' ", DOCKERFILE)
    assert left_out is not None
    lines = (CONTAINERS / "requirements.lock").read_text().splitlines()
    dropped = [line for line in lines if re.search(left_out[1], line)]
    assert dropped
    assert all(line.startswith(("nvidia-", "cuda-", "triton==")) for line in dropped)


def test_both_workers_start_alike_and_differ_in_where_the_driver_lies() -> None:
    assert image_entry_point("worker-cpu") == image_entry_point("worker-cuda")
    cpu, cuda = image_variables("worker-cpu"), image_variables("worker-cuda")
    assert cpu["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"
    assert set(cuda) - set(cpu) == {"LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
    assert {name: cuda[name] for name in cpu} == cpu
