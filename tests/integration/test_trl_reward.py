"""TRL's reward function with the real judges, and what TRL's own trainer makes of the rewards that it returns."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_parts import load_base, load_tokenizer
from datasets import Dataset
from fastapi import FastAPI
from peft import LoraConfig, get_peft_model
from serving import HeldScorer, serving, serving_scorer
from training_parts import prompts, request
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from reward_server.client import RewardClient
from reward_server.schemas import MAX_TITLE
from tasks.engines.art_session import BASE_MODEL_NAME, open_session
from tasks.engines.trl_engine.reward import TitleRewards, groups_of
from tasks.engines.trl_engine.validator import LocalValidator, Verdict
from tasks.starter.paths import BASE_MODEL
from tasks.titles.chat import open_client
from tasks.titles.errors import TooManyFailures, UnreadableVerdict
from tasks.titles.group_statistics import JUDGE_NOISE
from tasks.titles.judges import Judges
from tasks.titles.rollout import Failure, Rollout
from tasks.titles.story import Story

PROMPTS = prompts("train", 2)
DEAD_SERVER = "http://127.0.0.1:9"
GROUP = 3
# The reward server refuses it, and with it the batch that it comes in.
TOO_LONG = "x" * (MAX_TITLE + 1)

Reward = float | None
RewardFunction = Callable[..., list[Reward]]


def trainer_of(reward_function: RewardFunction, folder: Path, model: Any = None) -> GRPOTrainer:
    """Return a trainer of one step on two prompts, with three titles each."""
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        max_steps=1,
        learning_rate=1e-3,
        num_generations=GROUP,
        per_device_train_batch_size=2 * GROUP,
        max_completion_length=24,
        temperature=1.0,
        beta=0.0,
        seed=5,
    )
    rows = [{"prompt": list(prompt.messages), "story_id": prompt.story.id} for prompt in PROMPTS]
    return GRPOTrainer(
        model=model or policy(),
        reward_funcs=[reward_function],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(),
    )


def policy() -> Any:
    torch.manual_seed(2)
    return get_peft_model(
        load_base(), LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def by_hand(rewards: Sequence[Reward]) -> list[float]:
    """Return GRPO's advantages of one group, as if the rows without a reward had never been there."""
    valid = [reward for reward in rewards if reward is not None]
    if len(valid) < 2:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(valid), statistics.stdev(valid)
    return [0.0 if reward is None else (reward - mean) / (deviation + 1e-4) for reward in rewards]


@pytest.mark.parametrize(
    "rewards",
    [
        [1.0, None, 3.0, 0.5, 2.0, 2.5],
        [None, 0.0, 4.0, None, 2.0, 3.5],
        [None, 5.0, None, 1.0, 2.0, 3.0],
        [None, None, None, 1.0, 2.0, 4.0],
        [None] * 6,
    ],
    ids=["one missing", "two groups with one missing", "one of three left", "a group without any", "none at all"],
)
def test_trl_leaves_a_row_without_reward_out_of_its_group(rewards: list[Reward], tmp_path: Path) -> None:
    trainer = trainer_of(lambda **_: rewards, tmp_path)
    before = [weight.detach().clone() for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.train()
    advantages = list(trainer._logs["advantages"])
    assert advantages == pytest.approx(by_hand(rewards[:GROUP]) + by_hand(rewards[GROUP:]), abs=1e-5)
    assert all(advantage == 0.0 for advantage, reward in zip(advantages, rewards, strict=True) if reward is None)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))

    after = [weight.detach() for weight in trainer.model.parameters() if weight.requires_grad]
    assert all(weight.isfinite().all() for weight in after)
    moved = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert moved is any(advantages)


def test_trl_would_blow_the_judges_noise_up(tmp_path: Path) -> None:
    # What `TitleRewards` is there to prevent; without this, its own test below could not fail.
    noise = [2.0, 2.0 + JUDGE_NOISE / 2, 2.0, 1.0, 1.0, 1.0]
    trainer = trainer_of(lambda **_: noise, tmp_path)
    trainer.train()
    assert max(trainer._logs["advantages"]) > 0.2


class ScriptedValidator(LocalValidator):
    """Gives verdicts by title; every other title is supported."""

    def __init__(self, **verdicts: Verdict | UnreadableVerdict | Exception) -> None:
        self.verdicts = verdicts
        self.asked: list[str] = []

    def judge(self, pairs: Sequence[tuple[Story, str]]) -> list[Verdict | UnreadableVerdict]:
        self.asked += [title for _, title in pairs]
        return [self.verdicts.get(title, Verdict(True, 0.9, 0.0)) for _, title in pairs]  # type: ignore[misc]


def rewards_of(url: str, validator: LocalValidator | None = None, max_failed_share: float = 0.5) -> TitleRewards:
    return TitleRewards(
        stories={prompt.story.id: prompt for prompt in PROMPTS},
        validator=validator or LocalValidator(load_base(), load_tokenizer()),
        reward_model_url=url,
        reward_model_api_key=None,
        max_failed_share=max_failed_share,
    )


def call(rewards: TitleRewards, titles: Sequence[str]) -> list[Reward]:
    """Call the reward function as TRL does, with titles of the two prompts, half of each."""
    half = len(titles) // 2
    asked = [PROMPTS[index // half] for index in range(len(titles))]
    return rewards(
        prompts=[list(prompt.messages) for prompt in asked],
        completions=[[{"role": "assistant", "content": title}] for title in titles],
        completion_ids=[[1] * (number + 1) for number in range(len(titles))],
        story_id=[prompt.story.id for prompt in asked],
        trainer_state=None,
    )


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.client._FIRST_PAUSE_S", 0.001)


@pytest.fixture
def rewards(reward_server_url: str) -> Iterator[TitleRewards]:
    made = rewards_of(reward_server_url)
    yield made
    made.close()


def test_rewards_inside_trl_are_those_of_the_art_path(tmp_path: Path, reward_server_url: str) -> None:
    model = policy()
    rewards = rewards_of(reward_server_url, LocalValidator(model, load_tokenizer()))
    trainer = trainer_of(rewards, tmp_path / "trl", model)
    trainer.train()
    rewards.close()
    judged = rewards.take()
    rollouts = [outcome for _, outcome in judged.rows if isinstance(outcome, Rollout)]
    assert [prompt.story.id for prompt, _ in judged.rows] == [p.story.id for p in PROMPTS for _ in range(GROUP)]
    assert len(rollouts) == 2 * GROUP
    assert {rollout.title for rollout in rollouts} == {text.strip() for text in trainer._logs["completion"]}
    assert sum(rollout.tokens for rollout in rollouts) / len(rollouts) == pytest.approx(
        logged(trainer, "completions/mean_length")[0]
    )
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))

    async def art_path() -> list[float]:
        async with (
            open_session(request(tmp_path / "art", reward_server_url)) as (session, _),
            RewardClient(reward_server_url) as reward_client,
            open_client(session.base_url, session.api_key, concurrency=6) as validator,
        ):
            judges = Judges(reward_client=reward_client, validator=validator, base_model_name=BASE_MODEL_NAME)
            return [
                (await judges.judge(prompt.story, outcome.title)).reward
                for prompt, outcome in judged.rows
                if isinstance(outcome, Rollout)
            ]

    expected = asyncio.run(art_path())
    assert [rollout.reward for rollout in rollouts] == pytest.approx(expected, abs=1e-3)
    assert list(trainer._logs["rewards"]["title_reward"]) == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 0


def test_a_dead_reward_server_stops_training_with_the_reason(tmp_path: Path) -> None:
    rewards = rewards_of(DEAD_SERVER, max_failed_share=0.99)
    trainer = trainer_of(rewards, tmp_path)
    with pytest.raises(TooManyFailures, match=r"6 of 6 .*6 times reward model: ServiceUnavailable"):
        trainer.train()
    rewards.close()
    assert [type(outcome) for _, outcome in rewards.take().rows] == [Failure] * 6
    assert trainer.state.global_step == 0


def test_what_is_known_of_each_title(rewards: TitleRewards) -> None:
    before = time.monotonic()
    human, other = (prompt.story.title for prompt in PROMPTS)
    first, second = PROMPTS
    own, foreign, blank = rewards.judge([(first, f" {human}\n", 9), (first, other, 7), (second, " \n", 1)])
    assert isinstance(own, Rollout) and isinstance(foreign, Rollout) and isinstance(blank, Rollout)
    assert (own.title, own.length, own.tokens, own.verdict) == (human, len(human), 9, True)
    assert own.reward == own.score != 0
    assert (foreign.verdict, foreign.reward) == (False, 0.0)
    assert foreign.score != 0
    assert (blank.empty, blank.reward, blank.tokens, blank.reward_model_version) == (True, 0.0, 1, "")
    assert own.reward_model_version == foreign.reward_model_version != ""
    assert (own.story_id, own.messages, own.choice) == (first.story.id, first.messages, None)
    assert 0 <= time.time() - own.written <= time.monotonic() - before
    assert 0 < own.seconds <= time.monotonic() - before
    # What the callback judges by itself is no row of TRL's.
    assert rewards.take().rows == []


def test_blank_titles_are_shown_to_no_judge() -> None:
    validator = ScriptedValidator()
    rewards = rewards_of(DEAD_SERVER, validator)
    # Of one blank title and one that cannot be scored, the blank one has a reward.
    assert call(rewards, ["", " \n", "a title", "\t"]) == [0.0, 0.0, None, 0.0]
    assert validator.asked == ["a title"]
    assert call(rewards, ["", " \n"]) == [0.0, 0.0]
    rewards.close()


def test_only_a_refused_title_fails(reward_server_url: str) -> None:
    rewards = rewards_of(reward_server_url, ScriptedValidator())
    good = PROMPTS[0].story.title
    outcomes = rewards.judge([(PROMPTS[0], title, 5) for title in (good, TOO_LONG, good)])
    rewards.close()
    assert [type(outcome) for outcome in outcomes] == [Rollout, Failure, Rollout]
    assert isinstance(outcomes[1], Failure)
    assert outcomes[1].reason == "reward model: ServiceRejected"
    assert "422" in outcomes[1].message


def test_a_title_without_a_verdict_has_no_reward(reward_server_url: str) -> None:
    unsure = UnreadableVerdict("perhaps")
    unsure.service, unsure.neither = "validator", 0.7
    validator = ScriptedValidator(perhaps=unsure, never=Verdict(False, 0.0, 1.0))
    rewards = rewards_of(reward_server_url, validator)
    handed = call(rewards, ["perhaps", "one", "a much longer title", "perhaps", "never", "another"])
    judged = rewards.take()
    rewards.close()
    assert [reward is None for reward in handed] == [True, False, False, True, False, False]
    assert handed[4] == 0.0
    failures = [outcome for _, outcome in judged.rows if isinstance(outcome, Failure)]
    assert [failure.reason for failure in failures] == ["validator: UnreadableVerdict"] * 2
    assert judged.neither == pytest.approx((0.7 * 2 + 0.1 * 3 + 0.0) / 6)
    assert judged.seconds > 0


def test_a_validator_that_never_answers_stops_training(reward_server_url: str, tmp_path: Path) -> None:
    untrained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE_MODEL), dtype=torch.float32)
    rewards = rewards_of(reward_server_url, LocalValidator(untrained, load_tokenizer()))
    with pytest.raises(TooManyFailures, match="6 times validator: UnreadableVerdict"):
        trainer_of(rewards, tmp_path).train()
    rewards.close()


@pytest.mark.parametrize(("max_failed_share", "raises"), [(0.5, False), (0.3, True)])
def test_the_share_of_failures_is_bounded(reward_server_url: str, max_failed_share: float, raises: bool) -> None:
    rewards = rewards_of(reward_server_url, ScriptedValidator(), max_failed_share)
    titles = [TOO_LONG, "One", TOO_LONG, "Two", "Another title", "Yet another"]
    if raises:
        with pytest.raises(TooManyFailures, match="2 of 6"):
            call(rewards, titles)
    else:
        handed = call(rewards, titles)
        assert [reward is None for reward in handed] == [True, False, True, False, False, False]
    # Either way the rows are there for whoever reports them.
    assert len(rewards.take().rows) == 6
    rewards.close()


async def test_a_group_without_spread_teaches_nothing(tmp_path: Path) -> None:
    app = FastAPI()
    # Three times either mean is no float32: handed over as they are, even equal rewards would have advantages.
    scores = [mean + noise * JUDGE_NOISE / 3 for mean in (2.73, 3.23) for noise in (-1, 0, 1)]
    app.post("/score/batch")(lambda: [{"score": score, "version": "noisy"} for score in scores])
    async with serving(app) as url:
        rewards = rewards_of(url, ScriptedValidator())
        trainer = trainer_of(rewards, tmp_path)
        await asyncio.to_thread(trainer.train)
        await asyncio.to_thread(rewards.close)
    assert list(trainer._logs["advantages"]) == [0.0] * 6
    # The rows keep what the judges said; TRL was told it to within their noise.
    assert [outcome.reward for _, outcome in rewards.take().rows if isinstance(outcome, Rollout)] == scores
    assert list(trainer._logs["rewards"]["title_reward"]) == pytest.approx(scores, abs=2 * JUDGE_NOISE)


async def test_both_judges_work_at_the_same_time() -> None:
    scorer = HeldScorer()

    class Meanwhile(ScriptedValidator):
        """Lets the reward server finish only while it judges itself: one after the other would never end."""

        def judge(self, pairs: Sequence[tuple[Story, str]]) -> list[Verdict | UnreadableVerdict]:
            assert scorer.entered.wait(30)
            scorer.door.set()
            return super().judge(pairs)

    async with serving_scorer(scorer) as (url, _):
        rewards = rewards_of(url, Meanwhile())
        handed = await asyncio.to_thread(call, rewards, ["One", "Another title", "A third", "And a fourth"])
        await asyncio.to_thread(rewards.close)
    assert None not in handed
    assert sum(scorer.batches) >= 4


def test_a_fault_of_the_validator_is_raised(reward_server_url: str) -> None:
    class Broken(ScriptedValidator):
        def judge(self, pairs: Sequence[tuple[Story, str]]) -> list[Verdict | UnreadableVerdict]:
            raise RuntimeError("on purpose")

    rewards = rewards_of(reward_server_url, Broken())
    with pytest.raises(RuntimeError, match="on purpose"):
        call(rewards, ["One", "Two"])
    rewards.close()
    assert rewards.take().rows == []


def test_what_was_judged_is_taken_once(rewards: TitleRewards) -> None:
    titles = [PROMPTS[0].story.title, "Something else", PROMPTS[1].story.title, ""]
    call(rewards, titles)
    call(rewards, titles[::-1])
    judged = rewards.take()
    assert [outcome.title for _, outcome in judged.rows if isinstance(outcome, Rollout)] == titles + titles[::-1]
    assert [outcome.tokens for _, outcome in judged.rows if isinstance(outcome, Rollout)] == [1, 2, 3, 4] * 2
    assert judged.neither is not None
    assert 0 <= judged.neither < 0.1
    nothing = rewards.take()
    assert (nothing.rows, nothing.seconds, nothing.neither) == ([], 0.0, None)


def test_groups_are_consecutive_rows_of_one_story() -> None:
    first, second = PROMPTS
    failed = [Failure(prompt.story.id, f"reason {number}", "") for number, prompt in enumerate((first, first, second))]
    groups = groups_of([(first, failed[0]), (first, failed[1]), (second, failed[2]), (first, failed[0])])
    assert [(group.prompt, group.failures) for group in groups] == [
        (first, (failed[0], failed[1])),
        (second, (failed[2],)),
        (first, (failed[0],)),
    ]
    assert groups_of([]) == []
