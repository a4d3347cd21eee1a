"""ART's engine on a GPU, with the reward server beside it: learns, serves what it has learned, and survives failures.

One training in three sittings, which the tests look at: two steps, then vLLM is killed among the third's rollouts;
the third again, and its update finds no memory; the third once more, and the whole process is killed among the
fourth's rollouts. Where there are two GPUs another has one each for trainer and vLLM. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import httpx
import psutil
import pytest
import torch
from art_parts import SITTING_S, STARTED, STEPS, Act, Sitting, art_request, compare_weights, fill_memory, kill_server
from gpu_parts import needs, pids_on_gpu, rows_of, show, start_vllm_quickly, wait_until_gone

from tasks.engines.art_session import ArtSession
from tasks.engines.canary import STANDARD_ERRORS, nearer_to_the_new
from tasks.engines.contract import TrainingRequest
from tasks.engines.resume import adapter_folder, stored_state
from tasks.titles import metric_names as names
from tasks.titles.errors import EngineDied, OutOfMemory, TooManyFailures

pytestmark = needs("art", "unsloth", "bitsandbytes")
HERE = Path(__file__).parent
KILLED_AT, GONE_S = STEPS - 1, 20.0
"""The step that the first two sittings do not come through; the time that processes have to go."""


@dataclass
class Ended:
    """A sitting, and what was left of it."""

    sitting: Sitting
    left: list[str]
    committed: int


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, judge_on_gpu: str) -> TrainingRequest:
    start_vllm_quickly()
    run_dir = tmp_path_factory.mktemp("art") / "run"
    run_dir.mkdir()
    return art_request(run_dir, judge_on_gpu)


def sit(asked: TrainingRequest, *acts: Act) -> Ended:
    before = pids_on_gpu()
    sitting = Sitting(asked)

    async def all_acts(sitting: Sitting, session: ArtSession) -> None:
        for act in acts:
            await act(sitting, session)

    # Not `asyncio.run`, which one of ART's packages replaces by one that goes on with a loop it finds.
    with asyncio.Runner() as runner:
        runner.run(sitting.sit({KILLED_AT: all_acts}))
    state = stored_state(asked.run_dir, "art")
    return Ended(sitting, wait_until_gone(sitting.processes, before, 2.0), state.cursor.step if state else -1)


@pytest.fixture(scope="module")
def first(asked: TrainingRequest) -> Ended:
    return sit(asked, compare_weights, kill_server)


@pytest.fixture(scope="module")
def second(first: Ended) -> Ended:
    return sit(first.sitting.asked, fill_memory)


def test_two_steps_are_trained_and_the_canary_holds(first: Ended) -> None:
    asked, rows = first.sitting.asked, rows_of(first.sitting.asked)
    assert set(rows) >= {0, 1, 2}, first.sitting.ended
    show("ART rows", rows)
    for step in (1, 2):
        assert 0 <= rows[step][names.CANARY_MEAN_DIFFERENCE] <= asked.profile.canary_tolerance
        assert rows[step][names.CANARY_FOLLOWED] > 0.6, "it can be told that the server holds the new adapter"
        assert rows[step]["train/groups_trainable"] >= 1
        assert rows[step][names.TRAIN_GRAD_NORM] > 0
        assert rows[step][names.TRAIN_TRAJECTORIES_DROPPED] == 0
        assert (adapter_folder(asked.run_dir, "art", step) / "optimizer.safetensors").stat().st_size > 1000


def test_the_adapter_of_a_step_serves_the_next(first: Ended) -> None:
    seen = first.sitting.seen
    assert "trainer 2" in seen, first.sitting.ended
    # What the canary would have said of a server that went on with the adapter of step 1.
    followed, left_behind = (
        nearer_to_the_new(seen[server], seen["files 1"], seen["trainer 2"]) for server in ("server 2", "server 1")
    )
    show("nearer to the new, standard error", {"server 2": followed, "server 1": left_behind})
    assert followed and followed[0] > 0.6
    assert left_behind and left_behind[0] < 0.5 - STANDARD_ERRORS * left_behind[1]
    apart = {
        f"{one}, {other}": mean(abs(a - b) for a, b in zip(seen[one], seen[other], strict=True))
        for one, other in (
            ("server 2", "files 2"),
            ("server 2", "files 1"),
            ("server 1", "files 1"),
            ("server base", "files base"),
            ("server 2", "files base"),
            ("trainer 2", "files 2"),
        )
    }
    show("nats apart on average", apart)
    assert apart["server 2, files 2"] < 0.5 * apart["server 2, files 1"]
    assert apart["trainer 2, files 2"] < 0.5 * apart["server 2, files 1"]
    assert apart["server base, files base"] < 0.5 * apart["server 2, files base"], "the validator's name"


def test_a_server_killed_among_rollouts_stops_the_run_with_its_reason(first: Ended) -> None:
    ended = first.sitting.ended
    assert isinstance(ended, EngineDied), ended
    assert isinstance(ended.__cause__, TooManyFailures), "it was killed before all titles were there"
    for words in ("signal SIGKILL", "The same command continues", "vllm-runtime.log:"):
        assert words in str(ended)
    assert first.left == []
    assert first.committed == KILLED_AT - 1
    assert first.sitting.seconds_to_end < 60


def test_the_run_continues_without_a_lost_step(second: Ended, first: Ended) -> None:
    assert second.sitting.state is not None and second.sitting.state.cursor.step == KILLED_AT - 1
    assert second.sitting.stories == {KILLED_AT: first.sitting.stories[KILLED_AT]}


def test_full_memory_in_the_update_stops_the_run_with_its_reason(second: Ended) -> None:
    assert isinstance(second.sitting.ended, OutOfMemory), second.sitting.ended
    assert "The GPU's memory is full" in str(second.sitting.ended)
    assert second.left == []
    assert second.committed == KILLED_AT - 1


def test_the_reward_server_beside_it_still_judges_on_the_gpu(second: Ended, judge_on_gpu: str) -> None:
    health = httpx.get(f"{judge_on_gpu}/health").raise_for_status().json()
    assert health["device"] == "cuda", health


def test_a_process_killed_outright_leaves_nothing_and_had_continued(second: Ended, judge_on_gpu: str) -> None:
    run_dir = second.sitting.asked.run_dir
    before = pids_on_gpu()
    with (run_dir / "third.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, HERE / "art_parts.py", run_dir, judge_on_gpu],
            stdout=log,
            stderr=log,
            timeout=SITTING_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])},
        )
    assert done.returncode == -9, (run_dir / "third.log").read_text()[-4000:]
    started = set()
    for pid in json.loads((run_dir / STARTED).read_text()):
        try:
            started.add(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    assert wait_until_gone(started, before, GONE_S) == []
    state = stored_state(run_dir, "art")
    assert state is not None and state.cursor.step == KILLED_AT
    rows = rows_of(second.sitting.asked)
    assert sorted(rows) == list(range(KILLED_AT + 1))
    assert rows[KILLED_AT][names.CANARY_MEAN_DIFFERENCE] <= second.sitting.asked.profile.canary_tolerance


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_with_a_gpu_each_for_trainer_and_vllm_the_canary_holds(tmp_path: Path, judge_on_gpu: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    before = pids_on_gpu()
    sitting = Sitting(art_request(run_dir, judge_on_gpu, "art.trainer_gpus=[0]", "art.inference_gpus=[1]"))
    with asyncio.Runner() as runner:
        runner.run(sitting.sit({}))
    assert sitting.ended is None
    rows = rows_of(sitting.asked)
    show("ART rows on two GPUs", rows)
    assert sorted(rows) == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        assert 0 <= rows[step][names.CANARY_MEAN_DIFFERENCE] <= sitting.asked.profile.canary_tolerance
        assert rows[step][names.CANARY_FOLLOWED] > 0.6, "it can be told that the server holds the new adapter"
    assert wait_until_gone(sitting.processes, before, 2.0) == []
