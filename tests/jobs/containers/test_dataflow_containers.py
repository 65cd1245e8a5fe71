"""The images: made of a lock that agrees with the one of the tests, and of all that they need."""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moebeam.jobs.containers.worker_start import BOOT
from tests.support.clean_environment import CONTAINERS, image_entry_point, image_variables, stage_of
from tests.support.paths import ROOT

DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()


def read_lock(text: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package of a lock."""
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
    found = ((Requirement(re.split(r"[ ;\\]", entry)[0]), entry.count("--hash=sha256:")) for entry in entries if entry)
    return {requirement.name: (str(requirement.specifier), num_hashes) for requirement, num_hashes in found}


def pins(lock: Path) -> dict[str, str]:
    return {name: version for name, (version, _) in read_lock(lock.read_text()).items()}


@pytest.mark.parametrize("lock", [*ROOT.glob("requirements*.lock"), *CONTAINERS.glob("requirements*.lock")], ids=str)
def test_every_package_of_every_lock_has_its_hashes_and_no_index(lock: Path) -> None:
    text = lock.read_text()
    assert [name for name, (_, num_hashes) in read_lock(text).items() if not num_hashes] == []
    assert "://" not in text


def test_what_is_installed_is_held_against_its_hashes() -> None:
    installs = re.findall(r"pip install.*?(?=&&|\n(?!\t? ))", DOCKERFILE + (ROOT / "Makefile").read_text(), re.DOTALL)
    unchecked = [words for words in installs if "lock" in words and "--require-hashes" not in words]
    # A version of torch's own index, and tests with packages that no lock names.
    assert [words for words in unchecked if "torch==" not in words and "venv-floors" not in words] == []
    assert len(installs) - len(unchecked) >= 6


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


def test_the_cpu_image_leaves_out_nothing_but_cuda_and_takes_torch_from_elsewhere() -> None:
    keep = re.search(r"awk '(.*)' /build", DOCKERFILE)
    assert keep is not None
    lock = CONTAINERS / "requirements.lock"
    kept = subprocess.run(["awk", keep[1], str(lock)], capture_output=True, text=True, check=True).stdout
    dropped = pins(lock).keys() - read_lock(kept).keys()
    assert "nvidia-cublas" in dropped
    assert all(name.startswith(("nvidia-", "cuda-")) for name in dropped - {"triton", "torch"})
    assert all(num_hashes for _, num_hashes in read_lock(kept).values())
    assert "'^torch==[^ ]*' /build/requirements.lock" in DOCKERFILE


@pytest.mark.parametrize("target", ["worker-cpu", "worker-cuda"])
def test_workers_are_not_root_unless_their_builder_says_so(target: str) -> None:
    assert "\nARG WORKER_USER=10001\n" in DOCKERFILE
    assert re.search(r"ARG WORKER_USER\nUSER \$\{WORKER_USER\}\nENTRYPOINT", stage_of(target))
    assert "-o /opt/moebeam/sbom.cdx.json" in stage_of(target)


def test_both_workers_start_alike_and_differ_in_where_the_driver_lies() -> None:
    assert image_entry_point("worker-cpu") == image_entry_point("worker-cuda")
    cpu, cuda = image_variables("worker-cpu"), image_variables("worker-cuda")
    assert cpu["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"
    assert set(cuda) - set(cpu) == {"LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
    assert {name: cuda[name] for name in cpu} == cpu
