"""Killed at any moment with SIGKILL and started again, a run ends with the same weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")


KINDS = ("lora", "qlora", "dpo", "kto, full")


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """What the driver saw; the steps at which it kills are drawn anew each time, and shown when a test fails."""
    folder, seed = tmp_path_factory.mktemp("resume"), random.randrange(10**6)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("resume_driver.py"), folder, str(seed), *KINDS, "inside"],
        check=False, capture_output=True, text=True, timeout=580, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    logs = "".join(log.read_text()[-2000:] for log in folder.glob("*/log.txt"))
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-2000:]}\n{logs}"
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_steps_ends_with_the_same_weights_and_losses(driven, kind):
    seen = driven[kind]
    assert set(seen["killed"]) == {signal.SIGKILL} and seen["last"] == seen["whole_status"] == 0
    assert seen["resumed"] == seen["whole"], f"killed at {seen['steps']}"


@pytest.mark.slow
def test_a_run_killed_inside_a_checkpoint_or_before_its_report_ends_with_the_same_weights(driven):
    seen = driven["inside"]
    assert seen["statuses"] == [signal.SIGKILL] * 4 + [0]
    assert seen["result"] == driven["lora"]["whole"]
