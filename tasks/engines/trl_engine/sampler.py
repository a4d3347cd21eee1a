"""TRL's separate sampler on a CPU, and the canary that watches it, on a CPU and a GPU alike.

With `use_vllm`, TRL samples with vLLM: it copies the policy's weights there whenever a step was made,
and corrects its loss for what the two models' log-probabilities differ by. Without a GPU the same way
through `GRPOTrainer` is taken with the CPU service's decoder at its end, so that both engines draw the
same titles from the same weights and seeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tasks.engines.adapter_files import save_adapter
from tasks.engines.canary import canary_prompt, compare
from tasks.engines.cpu.chat import end_of_turn
from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.decoder import Decoder
from tasks.engines.cpu.sampler import Completion, Generation, generate
from tasks.engines.cpu.weights import check_supported, copy_state, decoder_weights, merge_adapter
from tasks.engines.trl_engine.validator import plain_logits
from tasks.titles.errors import ConfigError

if TYPE_CHECKING:
    from trl import GRPOTrainer

SeedOf = Callable[[tuple[int, ...], int], int]
"""Returns the seed of a title from its prompt's token ids and its number in the group. The canary's prompt is asked
for as well."""
Titles = tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]
"""Token ids of prompts and of completions, and per completion token a list of log-probabilities in nats and one of the
tokens that they are of: here always the sampled one alone."""

CANARY_TOKENS = 32
"""Of the canary's title, at most: more than nearly all titles have. A policy that does not end its titles yet would
write on and on."""


class CpuGeneration:
    """Samples with weights of its own; does what `GRPOTrainer` asks of TRL's `VLLMGeneration`.

    Titles are sampled at temperature 1, the only one that a profile allows.
    """

    def __init__(
        self, model: PeftModel, *, max_tokens: int, seed_of: SeedOf, cores: Cores, process_index: int = 0
    ) -> None:
        """Copy the weights below the adapter of `model`; the adapter comes with `sync_weights`.

        `process_index` is this process's among those that share the batch: their shares, all of one size, follow
        each other, and a group may reach from one into the next. Raises `ConfigError` for a model that the CPU's
        decoder cannot sample from exactly.
        """
        base = cast(PreTrainedModel, model.get_base_model())
        check_supported(base.config)
        self._model = model
        self._config = base.config
        # PEFT puts each adapted layer of the model behind one of its own.
        state = {key.replace(".base_layer.", "."): value for key, value in copy_state(base).items()}
        self._base = {key: value for key, value in state.items() if ".lora_" not in key}
        self._decoder = Decoder(decoder_weights(self._base, base.config))
        self._stop = frozenset(end_of_turn(base.generation_config))
        self.max_completion_length = max_tokens
        self._seed_of = seed_of
        self._cores = cores
        self._process_index = process_index

    def sync_weights(self) -> None:
        """Take over the trainer's adapter, the way that it would travel to another process: through files."""
        with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
            save_adapter(self._model, Path(folder))
            merged = merge_adapter(self._base, Path(folder))
        self._decoder = Decoder(decoder_weights(merged, self._config))

    def generate(
        self,
        prompts: list[list[int]],
        images: None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> Titles:
        """Return one title per prompt; each prompt comes `num_generations` times in a row, as TRL sends them."""
        first = self._process_index * len(prompts)
        with profiler or nullcontext():
            titles = self.sample(
                prompts,
                [self._seed_of(tuple(prompt), place % num_generations) for place, prompt in enumerate(prompts, first)],
            )
        return (
            prompts,
            [title.tokens for title in titles],
            [[[logprob] for logprob in title.logprobs] for title in titles],
            [[[token] for token in title.tokens] for title in titles],
        )

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """Return a title per prompt and seed, from the weights of the last sync.

        Raises `ConfigError` for a prompt that leaves no room for a title.
        """
        longest = max(map(len, prompts), default=0)
        if longest + self.max_completion_length > self._decoder.context:
            raise ConfigError(
                f"The model reads {self._decoder.context} tokens, but a prompt of {longest} and a title of up to "
                f"{self.max_completion_length} were asked for. Lower max_prompt_tokens or max_completion_tokens."
            )
        requests = [
            Generation(tuple(prompt), self.max_completion_length, (seed,), stop=self._stop)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return generate(self._decoder, requests, self._cores)


def install(trainer: GRPOTrainer, generation: CpuGeneration) -> None:
    """Make `trainer` sample with `generation`, as its constructor does with vLLM where there is a GPU."""
    parts = cast(Any, trainer)
    parts.use_vllm = True
    parts.vllm_generation = generation
    parts._last_loaded_step = -1


class Canary:
    """Has the sampler write a title, and compares its log-probabilities with the trainer's.

    A title and its log-probabilities are all that vLLM gives in each of TRL's modes. It is another title each time,
    so the trainer's values from before its update are not at hand.
    """

    def __init__(self, trainer: GRPOTrainer, tolerance: float) -> None:
        """Compare `trainer` with its sampler; the log-probabilities may differ by `tolerance` nats on average."""
        self.metrics: dict[str, float] = {}
        """Of the last check, by name."""
        self._trainer = cast(Any, trainer)
        self._tolerance = tolerance
        self._prompt = canary_prompt(self._trainer.processing_class)

    def check(self) -> None:
        """Raise `SamplerDisagrees` where trainer and sampler hold different weights."""
        answer = self._trainer.vllm_generation.generate(prompts=[self._prompt], images=None, num_generations=1)
        title, logprobs = answer[1][0], answer[2][0]
        checked = compare(
            [token[0] for token in logprobs],
            self._trainer_logprobs(title),
            tokens=len(title),
            sampler="the sampler",
            tolerance=self._tolerance,
        )
        self.metrics = checked.metrics()

    @torch.no_grad()
    def _trainer_logprobs(self, title: Sequence[int]) -> list[float]:
        model = self._trainer.model
        tokens = torch.tensor([[*self._prompt, *title]], device=model.device)
        with plain_logits():
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(self._prompt) - 1 : -1]
        written = tokens[0, len(self._prompt) :, None]
        return cast(list[float], logits.float().log_softmax(dim=-1).gather(1, written)[:, 0].tolist())


def watch(trainer: GRPOTrainer, tolerance: float) -> Canary:
    """Have every sync of the trainer's sampler followed by a check of the returned canary."""
    canary = Canary(trainer, tolerance)
    generation = cast(Any, trainer).vllm_generation
    sync = generation.sync_weights
    if hasattr(generation, "llm"):  # vLLM in this process
        _wake_up_only_sleepers(generation.llm)

    def sync_and_check() -> None:
        sync()
        with _short_and_awake(generation):
            canary.check()

    generation.sync_weights = sync_and_check
    return canary


@contextmanager
def _short_and_awake(generation: Any) -> Iterator[None]:
    """Let `generation` write no more than `CANARY_TOKENS` tokens, and vLLM not fall asleep behind them.

    In sleep mode TRL ends every `generate` by throwing vLLM's weights away: the rollouts after a canary would have
    to wait for the same weights a second time.
    """
    longest, sleeps = generation.max_completion_length, getattr(generation, "enable_sleep_mode", False)
    generation.max_completion_length = min(longest, CANARY_TOKENS)
    if sleeps:
        generation.llm.wake_up(tags=["kv_cache"])
        generation.enable_sleep_mode = False
    try:
        yield
    finally:
        generation.max_completion_length = longest
        if sleeps:
            generation.enable_sleep_mode = True


def _wake_up_only_sleepers(llm: Any) -> None:
    """Have TRL's calls to a vLLM that is awake already do nothing, which vLLM would warn of each time."""
    wake_up = llm.wake_up

    def wake_up_if_asleep(tags: list[str] | None = None) -> None:
        if llm.llm_engine.is_sleeping():
            wake_up(tags=tags)

    llm.wake_up = wake_up_if_asleep
