"""A packed update on a GPU is the update of its trajectories one by one, up to what bfloat16 leaves unsure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_parts import needs, show

pytestmark = needs("art", "unsloth", "bitsandbytes")
HERE = Path(__file__).parent


def test_packed_and_single_log_probabilities_and_gradients_are_the_same(tmp_path: Path) -> None:
    root = str(HERE.parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / "packed_parts.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    show("packed against single", figures)
    packed, rounding = figures["packed_against_single"], figures["rounding_alone"]
    assert figures["sequences"]["shared"] < figures["sequences"]["alone"] == 24
    assert figures["tokens_read"]["shared"] < 0.5 * figures["tokens_read"]["alone"]
    assert packed["logprob_mean"] < 2 * rounding["logprob_mean"] + 0.005
    assert packed["gradient_cosine"] > 0.98
    assert 0.95 < packed["gradient_norm_ratio"] < 1.05
