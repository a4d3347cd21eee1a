"""Training with the real parts: CPU service, reward server and MLflow, a few steps on a few stories."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from training_parts import open_tracker, profile, prompts, request, tracking_uri

from reward_server.client import RewardClient
from tasks.engines.art_loop import train
from tasks.engines.art_session import (
    VLLM_GRAPHS,
    ArtSession,
    check_art_settings,
    gpu_config,
    graph_sizes,
    open_session,
    server_config,
)
from tasks.engines.contract import Progress, TrainingRequest, TrainingResult
from tasks.engines.resume import adapter_folder, checkpoints_folder, journal_of, stored_state
from tasks.engines.tracker import MlflowTracker
from tasks.titles import metric_names as names
from tasks.titles.config import load_profile
from tasks.titles.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NothingToTrainOn,
    RunStopped,
    SamplerDisagrees,
    TooManyFailures,
)
from tasks.titles.group_statistics import JUDGE_NOISE
from tasks.titles.rollout import Roller, Sampling


async def run(asked: TrainingRequest, **options: Any) -> TrainingResult:
    tracker = open_tracker(asked)
    async with open_session(asked) as (session, state):
        return await train(asked, session=session, state=state, tracker=tracker, **options)


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


async def test_three_steps(trained_dir: Path, reward_server_url: str) -> None:
    asked = request(trained_dir, reward_server_url, max_steps=3)
    seen: list[Progress] = []
    result = await run(asked, on_progress=seen.append)

    assert (result.engine, result.steps) == ("art", 3)
    assert result.best_step in result.checkpoints
    # The newest two, the best and the untrained one are kept.
    assert set(result.checkpoints) == {0, 2, 3, result.best_step}
    for folder in result.checkpoints.values():
        assert {"adapter_model.safetensors", "adapter_config.json", "cursor.json"} <= {p.name for p in folder.iterdir()}
    assert [progress.step for progress in seen] == [0, 1, 2, 3]

    rows = journal_of(trained_dir).rows()
    assert sorted(rows) == [0, 1, 2, 3]
    # Validated before the first step, every eval_steps = 2 steps and after the last.
    assert [step for step in rows if names.VAL_REWARD_MEAN in rows[step]] == [0, 2, 3]
    best = rows[result.best_step][names.VAL_REWARD_MEAN]
    assert all(rows[step][names.VAL_REWARD_MEAN] <= best + JUDGE_NOISE for step in (0, 2, 3))
    for step in (1, 2, 3):
        row = rows[step]
        for name in (names.TRAIN_REWARD, names.TRAIN_LOSS, names.TRAIN_ENTROPY, names.TRAIN_GRAD_NORM):
            assert name in row
        groups = [row[f"train/groups_{kind}"] for kind in ("submitted", "trainable", "without_spread", "dropped")]
        assert groups[0] == sum(groups[1:])
        assert groups[1] >= 1
        assert 0 <= row[names.CANARY_MEAN_DIFFERENCE] <= row[names.CANARY_MAX_DIFFERENCE] < 1e-3
        assert 0.95 < row[names.CANARY_FOLLOWED] <= 1
        assert 0 < row[names.TRAIN_DISTINCT_TITLES] <= 1
        assert row[names.THROUGHPUT_TOKENS] > 0
    assert result.trajectories_dropped == sum(rows[step][names.TRAIN_TRAJECTORIES_DROPPED] for step in (1, 2, 3))

    titles = [progress.validation_titles for progress in seen]
    assert [bool(rows) for rows in titles] == [True, False, True, True]
    assert {"story_id", "title", "human_title", "reward", "score", "verdict", "length"} <= set(titles[0][0])
    assert json.loads((trained_dir / "validation" / "0003.json").read_text()) == list(titles[3])


async def test_a_complete_training_returns_its_result_from_disk(trained_dir: Path, reward_server_url: str) -> None:
    asked = request(trained_dir, reward_server_url, max_steps=3)
    before = {path: path.stat().st_mtime_ns for path in checkpoints_folder(trained_dir, "art").rglob("*")}
    rows = journal_of(trained_dir).rows()
    state = stored_state(trained_dir, "art")
    result = await run(asked)
    assert state is not None
    assert (result.steps, result.best_step, result.seconds) == (3, state.best_step, state.seconds)
    assert {path: path.stat().st_mtime_ns for path in checkpoints_folder(trained_dir, "art").rglob("*")} == before
    assert journal_of(trained_dir).rows() == rows


async def test_mlflow_holds_every_metric_once(trained_dir: Path, reward_server_url: str) -> None:
    tracker = open_tracker(request(trained_dir, reward_server_url, max_steps=3))
    rows = journal_of(trained_dir).rows()
    wanted = {name: [(step, rows[step][name]) for step in rows if name in rows[step]] for name in rows[0] | rows[3]}
    history = tracker.history()
    assert {name: history[name] for name in wanted} == wanted


async def test_another_mlflow_run_is_refused(trained_dir: Path, reward_server_url: str) -> None:
    asked = request(trained_dir, reward_server_url, max_steps=3)
    other = MlflowTracker.open(asked.profile, run_name="other", tracking_uri=tracking_uri(trained_dir))
    async with open_session(asked) as (session, state):
        with pytest.raises(CheckpointError, match=other.run_id):
            await train(asked, session=session, state=state, tracker=other)


@pytest.fixture
async def session(tmp_path: Path, reward_server_url: str) -> AsyncIterator[ArtSession]:
    async with open_session(request(tmp_path / "run", reward_server_url)) as (session, state):
        assert state is None
        yield session


async def test_titles_do_not_depend_on_what_else_is_sampled(session: ArtSession, reward_server_url: str) -> None:
    async with (
        RewardClient(reward_server_url) as reward_client,
        roller_of(session, reward_client) as roller,
        roller_of(session, reward_client, concurrency=1) as one_by_one,
    ):
        sampling = Sampling(model=await session.model_name(0), temperature=1.0, run_seed=1, step=0)
        stories = prompts("train", 3)
        single = [await one_by_one.group(prompt, sampling, 3) for prompt in stories]
        alone = [await roller.group(prompt, sampling, 3) for prompt in stories]
        again = [await roller.group(prompt, sampling, 3) for prompt in reversed(stories)][::-1]
        other = [await roller.group(prompt, replace(sampling, run_seed=2), 3) for prompt in stories]
    texts = [
        [[r.choice.message.content for r in group.rollouts] for group in groups] for groups in (alone, again, single)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != [[r.choice.message.content for r in group.rollouts] for group in other]
    for group in alone:
        assert len(group.rollouts) + len(group.failures) == 3
        for rollout in group.rollouts:
            assert len(rollout.choice.logprobs.content) == rollout.tokens
            assert rollout.reward == (rollout.score if rollout.verdict else 0.0)


async def test_an_unknown_checkpoint_is_an_error(session: ArtSession) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint 9"):
        await session.model_name(9)


def roller_of(session: ArtSession, reward_client: RewardClient, concurrency: int = 8) -> Roller:
    return Roller(
        endpoint=session,
        reward_client=reward_client,
        max_completion_tokens=24,
        context_tokens=session.context_tokens,
        concurrency=concurrency,
    )


async def test_a_dead_reward_server_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    asked = request(tmp_path / "run", "http://127.0.0.1:9", max_failed_share=0.5, val_stories=1)
    with pytest.raises(TooManyFailures, match="reward model: ServiceUnavailable"):
        await run(asked)
    # Nothing was committed, so the next try starts afresh.
    assert stored_state(asked.run_dir, "art") is None
    assert journal_of(asked.run_dir).rows() == {}


async def test_nothing_to_train_on_stops_the_run_with_the_reason(
    tmp_path: Path, reward_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real groups have a spread; with this much counted as noise, none has.
    monkeypatch.setattr("tasks.titles.group_statistics.JUDGE_NOISE", 1e9)
    asked = request(tmp_path / "run", reward_server_url, max_empty_batches=2, group_size=2, val_stories=1)
    with pytest.raises(NothingToTrainOn, match="2 batches in a row had nothing to train on: of 4 groups"):
        await run(asked)
    state = stored_state(asked.run_dir, "art")
    assert state is not None
    assert state.cursor.step == 0


async def test_a_server_left_one_adapter_behind_stops_the_run(
    session: ArtSession, tmp_path: Path, reward_server_url: str
) -> None:
    asked = request(tmp_path / "run", reward_server_url, eval_steps=9)
    update = session.train

    async def update_but_serve_the_old_adapter(groups: Any, *, step: int) -> dict[str, float]:
        metrics = await update(groups, step=step)
        if step == 2:
            service = await session.backend._get_service(session.model)
            await service.register_lora_for_step(step, str(adapter_folder(asked.run_dir, "art", step - 1)))
        return metrics

    session.train = update_but_serve_the_old_adapter  # type: ignore[method-assign]
    with pytest.raises(SamplerDisagrees, match=r"policy@2 has not followed the trainer.* a share of 0\.0"):
        await train(asked, session=session, state=None, tracker=open_tracker(asked))
    assert sorted(journal_of(asked.run_dir).rows()) == [0, 1]


async def test_no_stories_are_refused(tmp_path: Path, reward_server_url: str) -> None:
    asked = replace(request(tmp_path / "run", reward_server_url), val=[])
    with pytest.raises(DataError, match="0 to validate"):
        await train(asked, session=None, state=None, tracker=None)  # type: ignore[arg-type]


async def test_the_session_frees_its_port(tmp_path: Path, reward_server_url: str) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        async with open_session(request(tmp_path / "run", reward_server_url)) as (session, _):
            health = session.base_url.removesuffix("/v1") + "/health"
            assert httpx.get(health).status_code == 200
            raise RuntimeError("on purpose")
    with pytest.raises(httpx.ConnectError):
        httpx.get(health)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"packed_sequence_length": 300}, "424 tokens"),
        ({"packed_sequence_length": 1500}, "multiple"),
        ({"device": "cuda", "updates_per_step": "per_sequence", "art": {"sleep": False}}, "art.sleep"),
    ],
)
def test_settings_that_art_would_not_follow_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_art_settings(profile(**changes))


async def test_prompts_beyond_the_context_are_refused_at_the_start(tmp_path: Path, reward_server_url: str) -> None:
    asked = request(tmp_path / "run", reward_server_url, max_prompt_tokens=5000, packed_sequence_length=None)
    with pytest.raises(ConfigError, match="5024 is more than"):
        async with open_session(asked):
            pass


@pytest.mark.parametrize(("name", "share"), [("qwen-0.5b", 0.75), ("qwen-7b", 0.6)])
def test_what_art_is_told_on_a_gpu(name: str, share: float) -> None:
    own = load_profile(name)
    check_art_settings(own)
    config = gpu_config(own, 8448, 8704)
    assert config["init_args"] == {"max_seq_length": 8704, "load_in_4bit": False}
    assert config["engine_args"] == {
        "gpu_memory_utilization": share,
        "max_model_len": 8448,
        "max_num_batched_tokens": 16384,
        "dtype": "bfloat16",
        "max_lora_rank": 16,
        "compilation_config": {"cudagraph_capture_sizes": graph_sizes(own.rollout_concurrency)},
    }
    assert config["peft_args"] == {"r": 8, "lora_alpha": 8, "random_state": 1}
    assert config["trainer_args"] == {"max_grad_norm": 0.1, "optim": "adamw_8bit"}
    assert server_config()["server_args"]["served_model_name"] == "base"
    assert "trainer_gpu_ids" not in config


@pytest.mark.parametrize(
    ("at_once", "sizes"),
    [
        (1, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]),
        (20, [1, 2, 4, 8, 16, 24, 48, 96, 192, 384, 512]),
        (64, [1, 2, 4, *range(8, 65, 8), 128, 256, 512]),
        (500, list(VLLM_GRAPHS)),
        (2000, list(VLLM_GRAPHS)),
    ],
)
def test_the_batches_that_vllm_captures_graphs_of(at_once: int, sizes: list[int]) -> None:
    assert graph_sizes(at_once) == sizes


def test_a_rank_that_vllm_cannot_serve_is_refused() -> None:
    assert gpu_config(load_profile("qwen-0.5b", ["lora_rank=40"]), 8448, 8704)["engine_args"]["max_lora_rank"] == 64
    with pytest.raises(ConfigError, match="512 at most"):
        gpu_config(load_profile("qwen-0.5b", ["lora_rank=600"]), 8448, 8704)


@pytest.mark.slow
async def test_ten_times_the_learning_rate_collapses_and_rings_the_alarm(
    tmp_path: Path, reward_server_url: str
) -> None:
    asked = request(
        tmp_path / "run",
        reward_server_url,
        learning_rate={"art": 2e-2, "trl": 2e-2},
        train_stories=60,
        group_size=6,
        groups_per_step=8,
        max_steps=12,
        eval_steps=12,
        max_empty_batches=20,
        packed_sequence_length=1024,
    )

    def end_at_the_alarm(progress: Progress) -> None:
        if progress.metrics.get(names.TRAIN_COLLAPSED):
            raise RunStopped("The alarm has rung.")

    # A collapsed policy may stop the run by itself (nothing to train on, no readable verdicts on what it writes): the
    # alarm has rung by then.
    with contextlib.suppress(RunStopped):
        await run(asked, on_progress=end_at_the_alarm)
    rows = journal_of(asked.run_dir).rows()
    rung = [step for step in sorted(rows) if rows[step].get(names.TRAIN_COLLAPSED)]
    assert rung, {step: row.get(names.TRAIN_REWARD) for step, row in rows.items()}
    assert min(rung) > 5
