"""The engine on an accelerator that neither torch nor this project knows."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.models.checkpoint_layouts import OpenLayout
from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

ANSWERS = """
import json, sys
from tests.support.models.out_of_tree_device import NAME, calls
from moebeam.model_runner.torch_engine.engine import TorchEngine
from tests.support.models.checkpoint_layouts import make_prompts

def answers(device):
    engine = TorchEngine.load(sys.argv[1], device=device, max_cache_bytes=10**8)
    # Two that share much, one that shares nothing, and a pause in which the first grow.
    prompts = make_prompts([[*range(1, 40)], [*range(1, 30), 50, 51], [7, 8, 9]], 3)
    found = {done.prompt_id: (done.token_ids, str(done.error)) for done in engine.run(iter(prompts))}
    return str(engine.placement.device), sorted(found.items())

print(json.dumps([answers("cpu"), answers("auto"), sum(calls.values())]))
"""


@pytest.mark.parametrize("layout", ["v3", "v4"])
def test_an_accelerator_that_torch_does_not_know_gives_the_same_answers(open_layout: OpenLayout, layout: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, str(open_layout(layout).path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (cpu, on_cpu), (device, on_device), num_calls = json.loads(done.stdout.splitlines()[-1])
    assert cpu == "cpu" and re.fullmatch(r"abacus:[01]", device)
    assert on_device == on_cpu
    assert all(len(token_ids) == 3 and error == "None" for _, (token_ids, error) in on_cpu)
    assert num_calls > 500
