"""ART's Unsloth service, made to train a step at once and to be asked what its trainer thinks.

With `updates_per_step="one"` a step is one update over packed sequences (`packed_trainer`), and what surrounds it
is done once and only where it is needed. With "per_sequence" ART's own training runs, as it is: an update for each
trajectory. Server, trainer, checkpoints and resume are ART's in both.

It runs in the process that ART moves it to, where `art` must be imported before everything that Unsloth rewrites.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from art import dev
from art.local.checkpoints import get_last_checkpoint_dir
from art.metrics_taxonomy import TRAIN_GRADIENT_STEPS_KEY
from art.preprocessing.pack import DiskPackedTensors, packed_tensors_from_dir
from art.types import TrainConfig
from art.unsloth.service import UnslothService
from art.unsloth.train import UnslothTrainContext
from art.utils.get_model_step import get_step_from_dir
from art.utils.output_dirs import get_step_checkpoint_dir

# isort: split
import httpx
import torch

from tasks.engines.adapter_files import load_optimizer, save_optimizer, save_training
from tasks.engines.checkpoints import write_checkpoint
from tasks.engines.gpu.failures import TellsFailures
from tasks.engines.gpu.packed_trainer import PackedTrainer
from tasks.engines.stopwatch import Stopwatch
from tasks.titles import metric_names as names
from tasks.titles.memory_estimate import RESERVE

PRECISION = ("forward", "_original_forward")
"""The attributes by which accelerate makes a model compute in bfloat16 and answer in float32."""


@dataclass
class GpuService(UnslothService):
    """Unsloth's trainer, and vLLM's server as a child."""

    updates_per_step: Literal["one", "per_sequence"] = "one"
    sleep: bool = True
    """Whether vLLM gives its memory back while an update is made; with GPUs of their own it never does."""

    async def start_openai_server(self, config: dev.OpenAIServerConfig | None) -> tuple[str, int]:
        """Start vLLM as ART does, and keep the trainer's weights on the GPU where they fit beside it."""
        location = await super().start_openai_server(config)
        if self.updates_per_step == "one":
            if self._stays:
                self._state.reload_to_gpu()
            # What is loaded by now stays: the garbage collector would look through all of it again in each step.
            gc.collect()
            gc.freeze()
        return location

    async def train(
        self,
        disk_packed_tensors: DiskPackedTensors,
        config: TrainConfig,
        _config: dev.TrainConfig,
        verbose: bool = False,
    ) -> AsyncIterator[dict[str, float]]:
        """Train from packed tensors, write the next checkpoint and serve it; yield each update's metrics."""
        if self.updates_per_step == "one":
            yield await self._train_at_once(disk_packed_tensors, config, _config)
            return
        async for result in self._train_as_art(disk_packed_tensors, config, _config, verbose):
            yield result

    async def _train_at_once(
        self, disk_packed_tensors: DiskPackedTensors, config: TrainConfig, dev_config: dev.TrainConfig
    ) -> dict[str, float]:
        watch = Stopwatch()
        sleeps = self.sleep and not self.is_dedicated
        try:
            self._raise_if_child_failed()
            if sleeps:
                with watch.time(names.TIME_SLEEP):
                    await self._sleep_runtime()
            with watch.time(names.TIME_RELOAD):
                self._state.reload_to_gpu()
            with watch.time(names.TIME_UPDATE):
                metrics = self._packed_trainer.update(
                    packed_tensors_from_dir(**disk_packed_tensors), config, dev_config
                )
                torch.cuda.synchronize()
            step = get_step_from_dir(self.output_dir) + 1
            with watch.time(names.TIME_SAVE):
                self._save(step)
            if sleeps:
                with watch.time(names.TIME_WAKE):
                    if not self._stays:
                        self._state.offload_to_cpu()
                    gc.collect()
                    torch.cuda.empty_cache()
                    await self._wake_runtime()
            with watch.time(names.TIME_SYNC):
                await self._reload_adapter(get_step_checkpoint_dir(self.output_dir, step), step)
        except BaseException:
            # As ART does: a trainer and a server that may be at different steps are no use.
            await self.aclose()
            raise
        return {**metrics, **watch.seconds, TRAIN_GRADIENT_STEPS_KEY: 1.0}

    async def _reload_adapter(self, checkpoint_path: str, step: int) -> None:
        """Serve the adapter of a step, which never changes under its name.

        ART has vLLM load it in place; vLLM 0.22 then reads its files anew for every token that it samples, which took
        3.5 of the 5.4 seconds of a rollout.
        """
        self._raise_if_child_failed()
        if step not in self._loaded_adapter_steps:
            async with httpx.AsyncClient() as client:
                response = await client.post(
                    f"{self._vllm_base_url}/v1/load_lora_adapter",
                    json={"lora_name": f"{self.model_name}@{step}", "lora_path": checkpoint_path},
                    **self._runtime_request_kwargs(),
                    timeout=60.0,
                )
                response.raise_for_status()
            self._loaded_adapter_steps.add(step)
        self._latest_step = step

    async def _train_as_art(self, *arguments: Any) -> AsyncIterator[dict[str, float]]:
        """Train as ART does, and put the optimiser's state beside the adapter of the new checkpoint."""
        wrapper: dict[str, Any] = {}
        async for result in super().train(*arguments):
            attributes = vars(self._state.trainer.model)
            wrapper = {name: attributes[name] for name in PRECISION if name in attributes}
            yield result
        # ART takes accelerate's wrapper off to save the adapter, and nobody puts it back: from the second step on the
        # log-probabilities would be bfloat16, whose steps are 0.03 nats wide between 4 and 8.
        vars(self._state.trainer.model).update(wrapper)
        save_optimizer(
            cast(Any, self._state.trainer.model),
            _optimizer(self._state),
            Path(get_step_checkpoint_dir(self.output_dir, self._latest_step)),
            self._optimizer_facts,
        )

    async def trainer_logprobs(self, token_ids: list[int]) -> list[float]:
        """Return the trainer's own log p(token | tokens before it) in nats, for every token but the first.

        The weights are on the GPU meanwhile, besides what vLLM holds there.
        """
        state = self._state
        offloaded = state._is_offloaded
        state.reload_to_gpu()
        try:
            return _logprobs(state, token_ids)
        finally:
            if offloaded:
                state.offload_to_cpu()

    @cached_property
    def _state(self) -> UnslothTrainContext:
        _give_back_what_is_unused()
        state = cast(UnslothTrainContext, super()._state)
        folder = get_last_checkpoint_dir(self.output_dir)
        if folder is not None and get_step_from_dir(self.output_dir) > 0:
            load_optimizer(cast(Any, state.trainer.model), _optimizer(state), Path(folder))
        return state

    @cached_property
    def _packed_trainer(self) -> PackedTrainer:
        return PackedTrainer(
            cast(Any, self._state.trainer.model),
            _optimizer(self._state),
            max_grad_norm=self.config["trainer_args"]["max_grad_norm"],
        )

    @cached_property
    def _stays(self) -> bool:
        """Whether the trainer's weights stay on the GPU while vLLM is awake; first asked when vLLM has its memory."""
        if self.is_dedicated or not self.sleep:
            return True
        weights = sum(weight.nbytes for weight in self._state.peft_model.parameters())
        free, _ = torch.cuda.mem_get_info()
        return free >= weights + RESERVE

    @property
    def _optimizer_facts(self) -> dict[str, object]:
        return {"name": self.config["trainer_args"]["optim"]}

    def _save(self, step: int) -> None:
        with write_checkpoint(Path(self.output_dir) / "checkpoints", step) as folder:
            model = cast(Any, self._state.trainer.model)
            save_training(model, _optimizer(self._state), folder, self._optimizer_facts)


class TellingService(TellsFailures, GpuService):
    """What ART moves into a process of its own: `GpuService` with this project's errors."""


def _give_back_what_is_unused() -> None:
    """Have PyTorch take and give back memory page by page; before the weights come.

    Else it takes one block for all weights, which a single small tensor keeps from being given back to vLLM when the
    trainer makes room. ART turns this off for a vLLM in the same process; here it is in another, which inherits the
    environment and cannot sleep with it.
    """
    if torch.cuda.is_available():
        cast(Any, torch._C)._accelerator_setAllocatorSettings("expandable_segments:True")


def _optimizer(state: UnslothTrainContext) -> torch.optim.Optimizer:
    """Return the optimiser itself, which accelerate wraps when training begins."""
    optimizer: Any = state.trainer.optimizer
    return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))


@torch.no_grad()
def _logprobs(state: UnslothTrainContext, token_ids: list[int]) -> list[float]:
    model: Any = state.trainer.model
    head = model.get_output_embeddings().weight
    tokens = torch.tensor([token_ids], device=head.device)
    # ART's own way to ask Unsloth: the head is applied outside, to what the last layer says. Attention is causal.
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = model(input_ids=tokens).logits
    logits = hidden[0, :-1].float() @ head.float().T
    return cast(list[float], logits.log_softmax(dim=-1).gather(1, tokens[0, 1:, None])[:, 0].tolist())
