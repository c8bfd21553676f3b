"""The drill's classes of fault with workers on a Ray cluster, by the same command and judge as on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ottava.supervisor.scenario import TWELVE, scenario

from .test_ray import started_with, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

# A batch of 8: a worker at a twentieth of its speed would not be worth leaving with steps of a few milliseconds.
RECIPE = """
name: small
seed: 7
fleet: laptop
stages:
  label: {budget_s: 3, task: chains, cold_start: 100, answers: 400, test_per_length: 20, test_one_step: 20, audit: 50,
          max_error: 0.3}
  train: {budget_s: 90, steps: 900, batch: 8, virtual_shards: 2, direct: {begin: 0.3, weight: 0.5, batch: 2}}
"""
QUIET = {"supervisor", "torn", "shard", "disk"}
"""Classes whose faults may go by without a failure of the pool."""


def test_every_class_of_fault_on_a_ray_cluster(tmp_path: Path) -> None:
    """One drill of each class; one test, since they share a cluster, which the command starts and takes down."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    (tmp_path / "small.yaml").write_text(RECIPE)
    words = ["drill", str(tmp_path / "small.yaml"), "--seeds", f"0:{len(TWELVE)}", "--ray", "local", "--json"]
    mark = f"OTTAVA_TEST_MARK={uuid.uuid4().hex}"
    done = subprocess.run(
        [sys.executable, "-m", "ottava.cli", *words, "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env={**os.environ, **dict([mark.split("=")])},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    whole = json.loads(done.stdout)
    outcomes = {o["name"]: o for o in json.loads((tmp_path / "out" / "drill.json").read_text())["outcomes"]}
    assert tuple(outcomes) == TWELVE
    for name, found in outcomes.items():
        assert found["wrong"] == [], found
        assert found["struck"], found
        assert found["ended"] == "stopped" or found["identical"], found
        kinds = scenario(name, found["seed"], 24).kinds
        assert name in QUIET or not kinds or kinds & set(found["seen"]), found
    assert (whole["runs"], whole["broken"], whole["corrupt_loads"], whole["launcher"]) == (12, 0, 0, "ray")
    assert done.returncode == 0
    wait_until(lambda: not started_with(mark), "a process of the cluster is left")
