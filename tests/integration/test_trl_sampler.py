"""TRL's separate sampler on a CPU: a real `GRPOTrainer` above it, and the canary between the two."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pytest
import torch
from cpu_parts import load_tokenizer, load_with_adapter, plain_logprobs, write_adapter
from openai import AsyncOpenAI
from trl import GRPOTrainer
from trl_parts import grpo_trainer

from tasks.engines.canary import canary_prompt, canary_tokens
from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.sampler import prompt_logprobs
from tasks.engines.cpu.service import CpuService
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.trl_engine import sampler as sampler_module
from tasks.engines.trl_engine.sampler import CpuGeneration, Titles, install, watch
from tasks.engines.trl_engine.sampler_correction import LEFT_OUT, correct_in_the_update
from tasks.starter.paths import BASE_MODEL
from tasks.titles import metric_names as names
from tasks.titles.cursor import sampling_seed
from tasks.titles.errors import ConfigError, SamplerDisagrees
from tasks.titles.prompts import policy_messages

BODIES = ("A queue that needs less memory and restarts faster.", "Seven engineers left Corvane in May.")
GROUP, STEPS, TOKENS = 3, 3, 20
LEARNING_RATE = 1e-2


def seed_of(prompt: tuple[int, ...], generation: int) -> int:
    return sampling_seed(1, 0, 0, str(prompt), generation)


def prompt_ids(body: str) -> list[int]:
    ids = load_tokenizer().apply_chat_template(
        list(policy_messages(body)), add_generation_prompt=True, return_dict=False
    )
    return list(ids)


PROMPTS = [prompt_ids(body) for body in BODIES]
GROUPS = [prompt for prompt in PROMPTS for _ in range(GROUP)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, cores: Cores) -> list[Path]:
    """Adapters in `checkpoints`: 0 changes nothing, each next one changes more."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    return [write_adapter(root, step, cores, disturbance=0.05 * step) for step in range(3)]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Prefer rare tokens: titles that differ have different rewards."""
    return [sum(ids) / len(ids) for ids in completion_ids]


Maker = Callable[..., GRPOTrainer]


@pytest.fixture
def make(folders: list[Path], tmp_path: Path, cores: Cores) -> Maker:
    """Return a function that makes a trainer with an untrained adapter and a sampler of some kind."""

    def make(kind: type[CpuGeneration] = CpuGeneration, **options: Any) -> GRPOTrainer:
        arguments = {
            "max_steps": STEPS,
            "per_device_train_batch_size": len(GROUPS),
            "num_generations": GROUP,
            "max_completion_length": TOKENS,
            "learning_rate": LEARNING_RATE,
        }
        trainer = grpo_trainer(
            load_with_adapter(folders[0]),
            tmp_path,
            reward,
            [policy_messages(body) for _ in range(STEPS) for body in BODIES],
            **{**arguments, **options},
        )
        install(trainer, kind(trainer.model, max_tokens=TOKENS, seed_of=seed_of, cores=cores))  # type: ignore[arg-type]
        return trainer

    return make


def sampler_of(folder: Path, cores: Cores) -> CpuGeneration:
    sampler = CpuGeneration(load_with_adapter(folder), max_tokens=TOKENS, seed_of=seed_of, cores=cores)
    sampler.sync_weights()
    return sampler


class Recording(CpuGeneration):
    """Keeps what it was asked and answered, and what sampler and trainer say of a fixed title after each sync."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.answers: list[tuple[int, Titles]] = []
        self.syncs: list[tuple[list[float], list[float]]] = []

    def sync_weights(self) -> None:
        super().sync_weights()
        fixed = canary_tokens(load_tokenizer())
        self.syncs.append((prompt_logprobs(self._decoder, fixed), plain_logprobs(self._model, fixed[:1], fixed[1:])))

    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None) -> Titles:
        answer = super().generate(prompts, images, num_generations, profiler)
        self.answers.append((num_generations, answer))
        return answer


def test_trl_trains_on_the_decoder_s_titles_with_new_weights_at_every_step(make: Maker) -> None:
    trainer = make(Recording)
    sampler: Any = trainer.vllm_generation
    rewarded: list[list[int]] = []

    def recording_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewarded.extend(completion_ids)
        return reward(completion_ids)

    trainer.reward_funcs[0] = recording_reward
    trainer.train()

    assert [generations for generations, _ in sampler.answers] == [GROUP] * STEPS
    assert rewarded == [title for _, answer in sampler.answers for title in answer[1]]
    assert {len(title) for title in rewarded} != {TOKENS}, "some titles end by themselves"
    stop = load_tokenizer().eos_token_id
    for _, (prompts, titles, logprobs, tokens) in sampler.answers:
        assert prompts == GROUPS
        assert tokens == [[[token] for token in title] for title in titles]
        assert [len(one) for one in logprobs] == [len(title) for title in titles]
        assert all(title[-1] == stop or len(title) == TOKENS for title in titles)
        assert all(stop not in title[:-1] for title in titles)
        assert len({tuple(title) for title in titles[:GROUP]}) > 1, "each title has a seed of its own"
    # A ratio far from 1 would say that the sampler is not the model that is trained.
    steps = [row for row in trainer.state.log_history if "sampling/importance_sampling_ratio/min" in row]
    assert len(steps) == STEPS
    for row in steps:
        for kind in ("min", "mean", "max"):
            assert row[f"sampling/importance_sampling_ratio/{kind}"] == pytest.approx(1, abs=1e-3)
        assert 0 <= row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["grad_norm"] > 0
    assert len(sampler.syncs) == STEPS
    for sampled, trained in sampler.syncs:
        assert sampled == pytest.approx(trained, abs=1e-4)
    for (before, _), (after, _) in zip(sampler.syncs, sampler.syncs[1:], strict=False):
        assert max(abs(one - other) for one, other in zip(before, after, strict=True)) > 0.01


class Unsure(CpuGeneration):
    """Tells log-probabilities that are off, by different amounts, and for one token of each title none."""

    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None) -> Titles:
        prompts, titles, logprobs, tokens = super().generate(prompts, images, num_generations, profiler)
        for number, title in enumerate(logprobs):
            title[0][0] += -2.5 + number
            if len(title) > 1:
                title[1][0] = math.nan
        return prompts, titles, logprobs, tokens


@pytest.mark.parametrize("loss", ["dapo", "grpo", "cispo"])
def test_the_correction_in_the_update_is_trl_s(make: Maker, loss: str) -> None:
    options = {
        "loss_type": loss,
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": len(BODIES),
        "scale_rewards": "group",
    }
    theirs, ours = make(Unsure, **options), make(Unsure, **options)
    correct_in_the_update(ours)
    reads = []
    for trainer in (theirs, ours):
        read: list[torch.Size] = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, read=read: read.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        torch.manual_seed(3)
        trainer.train()
        reads.append(read)
    assert len(reads[1]) == len(reads[0]) / 2 == STEPS * len(BODIES)
    for one, other in zip(theirs.state.log_history[:STEPS], ours.state.log_history[:STEPS], strict=True):
        assert one["sampling/importance_sampling_ratio/min"] == 0 < one["sampling/importance_sampling_ratio/max"] < 3
        assert 0 < other[LEFT_OUT] < 1
        for name in ("loss", "grad_norm", "entropy"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
    expected = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


class Stale(CpuGeneration):
    """A sampler that goes on with the weights it began with."""

    def sync_weights(self) -> None:
        """Do nothing."""


class Sleeping(CpuGeneration):
    """Treats its weights as TRL treats vLLM's in sleep mode: thrown away after the titles, synced when they lack."""

    enable_sleep_mode = True
    _llm_weights_sleeping = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.llm = Sleeper()
        self.synced: list[int] = []
        """How many titles were asked for after each sync."""

    def sync_weights(self) -> None:
        self.llm.wake_up(tags=["weights"])
        super().sync_weights()
        self._llm_weights_sleeping = False
        self.synced.append(0)

    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any = None) -> Titles:
        if self.enable_sleep_mode and self._llm_weights_sleeping:
            self.sync_weights()
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])
        assert not self.llm.asleep, "vLLM cannot write while a part of it sleeps"
        answer = super().generate(prompts, images, num_generations, profiler)
        self.synced[-1] += len(prompts)
        if self.enable_sleep_mode:
            del self._decoder
            self._llm_weights_sleeping = True
            self.llm.asleep = {"weights", "kv_cache"}
        return answer


class Sleeper:
    """What `vllm.LLM` says and does about its sleep."""

    def __init__(self) -> None:
        self.asleep = {"weights", "kv_cache"}
        self.llm_engine = self

    def is_sleeping(self) -> bool:
        return bool(self.asleep)

    def wake_up(self, tags: list[str]) -> None:
        self.asleep.difference_update(tags)


@pytest.mark.parametrize("kind", [CpuGeneration, Sleeping])
def test_the_canary_is_quiet_while_the_weights_are_the_trainer_s(make: Maker, kind: type[CpuGeneration]) -> None:
    trainer = make(kind)
    canary = watch(trainer, 1e-3)
    seen = []
    check = canary.check
    canary.check = lambda: (check(), seen.append(canary.metrics))  # type: ignore[method-assign, assignment, func-returns-value]
    trainer.train()
    assert len(seen) == STEPS
    for metrics in seen:
        assert 0 < metrics[names.CANARY_MEAN_DIFFERENCE] <= metrics[names.CANARY_MAX_DIFFERENCE] < 1e-4
    # Between two steps, as a validation asks: a sampler that sleeps takes its weights once more.
    before = trainer.vllm_generation.generate(GROUPS, None, GROUP)
    assert trainer.vllm_generation.generate(GROUPS, None, GROUP) == before


def test_a_sync_serves_the_canary_and_the_titles_after_it(make: Maker) -> None:
    trainer = make(Sleeping)
    watch(trainer, 1e-3)
    trainer.train()
    sampler: Any = trainer.vllm_generation
    assert sampler.synced == [1 + len(GROUPS)] * STEPS
    assert sampler.enable_sleep_mode and sampler.max_completion_length == TOKENS


def test_the_canary_writes_no_long_title(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "CANARY_TOKENS", 2)
    trainer = make(Recording)
    watch(trainer, 1e-3)
    trainer.train()
    sampler: Any = trainer.vllm_generation
    assert [max(map(len, answer[1])) for number, answer in sampler.answers if number == 1] == [2] * STEPS
    assert max(len(title) for number, answer in sampler.answers if number > 1 for title in answer[1]) > 2


def test_the_canary_stops_a_training_whose_sampler_has_old_weights(make: Maker) -> None:
    trainer = make(Stale)
    canary = watch(trainer, 0.01)
    with pytest.raises(SamplerDisagrees, match="nats apart"):
        trainer.train()
    # At the first sync there was nothing to miss: an untrained adapter changes nothing.
    assert trainer.state.global_step == 1
    assert canary.metrics[names.CANARY_MEAN_DIFFERENCE] < 1e-4


def test_another_adapter_writes_other_titles(folders: list[Path], cores: Cores) -> None:
    first, same, other = (sampler_of(folders[step], cores).generate(GROUPS, None, GROUP) for step in (1, 1, 2))
    assert first == same
    differing = sum(one != two for one, two in zip(first[1], other[1], strict=True))
    assert differing >= len(GROUPS) // 2, "the adapters are far apart"


def test_titles_depend_on_their_seed_alone(folders: list[Path], cores: Cores) -> None:
    sampler = sampler_of(folders[1], cores)
    together = sampler.sample(GROUPS, range(len(GROUPS)))
    alone = [sampler.sample([prompt], [seed])[0] for seed, prompt in enumerate(GROUPS)]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    asked = sampler.generate(GROUPS, None, GROUP)[1]
    seeds = [seed_of(tuple(prompt), number) for prompt in PROMPTS for number in range(GROUP)]
    assert asked == [one.tokens for one in sampler.sample(GROUPS, seeds)]


async def test_both_engines_draw_the_same_titles_from_the_same_weights(folders: list[Path], cores: Cores) -> None:
    _, expected, logprobs, _ = sampler_of(folders[2], cores).generate(GROUPS, None, GROUP)
    run = folders[2].parents[1]
    service = CpuService(
        model_name="run", base_model=str(BASE_MODEL), output_dir=str(run), settings=CpuSettings(threads=2)
    )
    try:
        host, port = await service.start_openai_server(None)
        client = AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="none")
        for place in range(len(GROUPS)):
            body, number = BODIES[place // GROUP], place % GROUP
            answer = await client.chat.completions.create(
                model="run@2",
                messages=list(policy_messages(body)),  # type: ignore[arg-type]
                max_tokens=TOKENS,
                logprobs=True,
                seed=seed_of(tuple(prompt_ids(body)), number),
            )
            content = answer.choices[0].logprobs.content or []  # type: ignore[union-attr]
            assert [int(item.token.removeprefix("token_id:")) for item in content] == expected[place]
            own = [token[0] for token in logprobs[place]]
            assert [item.logprob for item in content] == pytest.approx(own, abs=1e-5)
    finally:
        await service.aclose()


def test_a_prompt_without_room_for_a_title_is_refused(folders: list[Path], cores: Cores) -> None:
    sampler = sampler_of(folders[0], cores)
    context = sampler._decoder.context
    room = sampler.sample([[5] * (context - TOKENS)], [0])
    assert 1 <= len(room[0].tokens) <= TOKENS
    with pytest.raises(ConfigError, match=f"a prompt of {context - TOKENS + 1}"):
        sampler.sample([[5] * (context - TOKENS + 1)], [0])


def test_the_canary_s_prompt_is_the_policy_s() -> None:
    tokenizer = load_tokenizer()
    prompt = canary_prompt(tokenizer)
    assert canary_tokens(tokenizer)[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
