"""TRL's engine on a GPU with vLLM in its process, and the reward server beside it: learns, and survives full memory.

One training in two sittings: the first step's update finds no memory, and the same command makes two steps. Another
with Unsloth in the trainer. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gpu_parts import Hog, PlainTracker, needs, pids_on_gpu, request, rows_of, show, wait_until_gone
from trl_full_update import BEGINS

from tasks.engines.contract import TrainingRequest
from tasks.engines.gpu.failures import family
from tasks.engines.resume import adapter_folder, stored_state
from tasks.engines.trl_engine import arguments, launch
from tasks.titles import metric_names as names
from tasks.titles.errors import OutOfMemory

pytestmark = needs("trl", "vllm")
HERE = Path(__file__).parent
STEPS = 2
SETTINGS = (f"max_steps={STEPS}", "groups_per_step=16", "group_size=8", "trl.micro_batch=128")


@dataclass
class Failed:
    """A sitting that somebody else's use of the GPU has ended."""

    asked: TrainingRequest
    ended: Exception
    left: list[str]
    committed: int


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, judge_on_gpu: str) -> Iterator[Failed]:
    run_dir: Path = tmp_path_factory.mktemp("trl") / "run"
    run_dir.mkdir()
    asked = request("trl", run_dir, judge_on_gpu, *SETTINGS)
    before, own = pids_on_gpu(), family(os.getpid())
    # vLLM falls asleep before: somebody who takes what it frees would end the run already there.
    with pytest.MonkeyPatch.context() as patch, Hog(since=run_dir / BEGINS), pytest.raises(Exception) as told:
        patch.setattr(arguments, "PROCESS", "trl_full_update")
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        asyncio.run(launch.train(asked, tracker=PlainTracker()))
    state = stored_state(run_dir, "trl")
    show("TRL without memory", {"ended": repr(told.value)[:2000]})
    left = wait_until_gone(family(os.getpid()) - own, before, 2.0)
    yield Failed(asked, told.value, left, state.cursor.step if state else -1)


def test_full_memory_in_the_update_stops_the_run_with_its_reason(failed: Failed) -> None:
    assert (failed.asked.run_dir / BEGINS).exists(), failed.ended
    assert isinstance(failed.ended, OutOfMemory), failed.ended
    assert "The GPU's memory is full" in str(failed.ended)
    assert failed.left == []
    assert failed.committed == 0


def test_the_same_command_makes_two_steps_and_the_canary_holds(failed: Failed) -> None:
    makes_two_steps(failed.asked)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed here")
def test_unsloth_in_the_trainer_makes_two_steps_and_the_canary_holds(tmp_path: Path, judge_on_gpu: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    makes_two_steps(request("trl", run_dir, judge_on_gpu, *SETTINGS, "trl.unsloth=true"))


def makes_two_steps(asked: TrainingRequest) -> None:
    before = pids_on_gpu()
    told: list[int] = []
    result = asyncio.run(
        launch.train(asked, tracker=PlainTracker(), on_progress=lambda progress: told.append(progress.step))
    )
    rows = rows_of(asked)
    show("TRL rows", rows)
    assert result.steps == STEPS and told == [1, 2] and sorted(rows) == [0, 1, 2]
    for step in (1, 2):
        assert 0 <= rows[step][names.CANARY_MEAN_DIFFERENCE] <= asked.profile.canary_tolerance
        assert rows[step]["train/groups_trainable"] >= 1
        assert rows[step][names.TRAIN_GRAD_NORM] > 0
        assert (adapter_folder(asked.run_dir, "trl", step) / "optimizer.safetensors").stat().st_size > 1000
    assert wait_until_gone(set(), before, 2.0) == []
