"""An open ART backend with its policy: a server of the base model and of every checkpoint, and a trainer.

The backend is a subclass of ART's `LocalBackend`: on a CPU with a service of this project, on a GPU with ART's own,
where Unsloth trains and vLLM serves.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tasks.engines.canary import CanaryCheck, canary_tokens, check_canary
from tasks.engines.checkpoints import steps_on_disk
from tasks.engines.context import context_tokens, positions
from tasks.engines.contract import TrainingRequest
from tasks.engines.cpu.settings import CpuSettings
from tasks.engines.resume import (
    ART_MODEL,
    ART_PROJECT,
    adapter_folder,
    checkpoints_folder,
    engine_folder,
    prepare_to_continue,
)
from tasks.engines.training_state import TrainingState
from tasks.titles.config import Profile, Settings
from tasks.titles.errors import CheckpointError, ConfigError
from tasks.titles.packed_sequences import LOGPROB_CHUNK, packed_length, padded_text
from tasks.titles.rollout import RolloutGroup

logger = logging.getLogger(__name__)

BASE_MODEL_NAME = "base"
# The ranks that vLLM reserves room for; its default is 16.
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
# What vLLM reads in one pass where it has no server. Its server reads half of that or less, so that the first of many
# users waits less; here all wait for the last title, and every pass over prompts costs the host the launches of some
# thousand kernels.
VLLM_PASS_TOKENS = 16384
# The batch sizes, in tokens, that vLLM itself captures CUDA graphs of.
VLLM_GRAPHS = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))


class ArtSession:
    """A registered policy: implements `rollout.Endpoint` and trains. Open it with `open_session`."""

    def __init__(self, *, request: TrainingRequest, backend: Any, model: Any, context_tokens: int) -> None:
        from transformers import AutoTokenizer

        self.profile = request.profile
        self._packed_length = packed_length(request.profile, positions(request.base_model))
        self.backend = backend
        self.model = model
        self.run_dir = request.run_dir
        self.context_tokens = context_tokens
        """What the policy's context holds, in tokens."""
        self.base_url: str = model.inference_base_url
        self.api_key: str = model.inference_api_key
        self.base_model_name = BASE_MODEL_NAME
        self._canary = canary_tokens(AutoTokenizer.from_pretrained(request.base_model))
        self._trainer_before: list[float] | None = None
        """The trainer's log-probabilities of the canary at the last check of this session that could tell."""
        self._loaded = {self.step}

    @property
    def step(self) -> int:
        """The policy's current step: the highest checkpoint on disk."""
        return max(steps_on_disk(checkpoints_folder(self.run_dir, "art")), default=0)

    async def model_name(self, step: int) -> str:
        """Return the name that checkpoint `step` is served under, loading it where needed."""
        folder = adapter_folder(self.run_dir, "art", step)
        if step not in self._loaded:
            if not folder.is_dir():
                raise CheckpointError(f"There is no checkpoint {step} to serve: {folder} does not exist.")
            service = await self.backend._get_service(self.model)
            await service.register_lora_for_step(step, str(folder))
            self._loaded.add(step)
        return f"{ART_MODEL}@{step}"

    async def train(self, groups: Sequence[RolloutGroup], *, step: int) -> dict[str, float]:
        """Make one policy update, from checkpoint `step - 1` to `step`, and return ART's metrics.

        The server answers for the new checkpoint when this returns.
        """
        import art

        trajectory_groups = [
            art.TrajectoryGroup(
                [
                    # The reward is always given: ART's own default is 0.
                    art.Trajectory(
                        messages_and_choices=[*rollout.messages, rollout.choice],  # type: ignore[list-item]
                        reward=rollout.reward,
                    )
                    for rollout in group.rollouts
                ],
                metadata={"scenario_id": group.prompt.story.id},
            )
            for group in groups
        ]
        packed = self._packed_length
        result = await self.backend.train(
            self.model,
            trajectory_groups,
            learning_rate=self.profile.learning_rate.art,
            loss_fn=self.profile.loss.art,
            kl_penalty_coef=self.profile.kl_beta,
            packed_sequence_length=packed,
            logprob_calculation_chunk_size=min(LOGPROB_CHUNK, packed) if packed else LOGPROB_CHUNK,
        )
        updates = result.metrics.get("data/step_num_gradient_steps", 0.0)
        if result.step != step or not updates:
            raise CheckpointError(
                f"ART must have made checkpoint {step} by at least one update, but made {updates:g} and stands at "
                f"step {result.step}. Every group has a spread of rewards, so its trajectories were not usable: "
                "look at its log."
            )
        self._loaded.add(step)
        return dict(result.metrics)

    async def check_canary(self, step: int) -> CanaryCheck:
        """Compare server and trainer on a fixed title at checkpoint `step`.

        Raises `SamplerDisagrees` where they differ by more than the profile's `canary_tolerance`, and where the
        server has not followed the trainer since the last check that could tell.
        """
        trained = await self.backend.trainer_logprobs(self.model, self._canary)
        checked = await check_canary(
            self.model.openai_client(),
            await self.model_name(step),
            self._canary,
            trained,
            before=self._trainer_before,
            tolerance=self.profile.canary_tolerance,
        )
        if self._trainer_before is None or checked.followed is not None:
            self._trainer_before = trained
        return checked

    async def forget(self, keep: set[int]) -> None:
        """Unload every checkpoint but those of `keep` from the server."""
        await self.backend.prune_model_adapters(self.model, retain_steps=keep)
        self._loaded &= keep


@asynccontextmanager
async def open_session(request: TrainingRequest) -> AsyncIterator[tuple[ArtSession, TrainingState | None]]:
    """Bring the run's directory in order, open the backend and register the policy; close it whatever happens.

    Yields the session and the state to continue from, None for a fresh run.

    Raises `ConfigError` for settings that ART cannot follow and `CheckpointError` for a directory that
    cannot be continued.
    """
    profile = request.profile
    check_art_settings(profile)
    state = prepare_to_continue(request)
    context = context_tokens(request.base_model, profile)
    async with open_backend(profile, request.base_model, engine_folder(request.run_dir, "art")) as (backend, model):
        yield ArtSession(request=request, backend=backend, model=model, context_tokens=context), state


@asynccontextmanager
async def open_backend(
    profile: Profile, base_model: str, folder: Path, *, adapters_in_memory: int = CpuSettings.adapters_in_memory
) -> AsyncIterator[tuple[Any, Any]]:
    """Open ART's backend in `folder` and register a policy on it; yield both, and close it whatever happens.

    `adapters_in_memory` bounds how many adapters the CPU service holds ready for sampling.

    Where the backend knows what is behind an exception of the body, such as a server that has died, that is raised.
    """
    _prepare_environment()
    import art
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if profile.device == "cuda":
        from tasks.engines.gpu.backend import GpuBackend

        backend: Any = GpuBackend(
            path=str(folder), seed=profile.seed, updates_per_step=profile.updates_per_step, sleep=profile.art.sleep
        )
        packed = packed_length(profile, positions(base_model))
        internal_config = gpu_config(profile, context_tokens(base_model, profile), packed)
    else:
        from tasks.engines.cpu.backend import CpuBackend

        backend = CpuBackend(
            path=str(folder),
            settings=CpuSettings(
                lora_rank=profile.lora_rank,
                lora_alpha=profile.lora_alpha,
                max_grad_norm=profile.max_grad_norm,
                updates_per_step=profile.updates_per_step,
                seed=profile.seed,
                adapters_in_memory=adapters_in_memory,
            ),
        )
        internal_config = None
    try:
        model: Any = art.TrainableModel(
            name=ART_MODEL,
            project=ART_PROJECT,
            base_model=base_model,
            report_metrics=[],
            _internal_config=internal_config,
        )
        await model.register(backend, _openai_client_config=server_config())
        yield backend, model
    except Exception as error:
        behind = await backend.behind(error)
        if behind is None:
            raise
        raise behind from error
    finally:
        await backend.close()


def check_art_settings(profile: Profile) -> None:
    """Raise `ConfigError` for settings that ART would silently not follow."""
    packed = profile.packed_sequence_length
    longest = profile.max_prompt_tokens + profile.max_completion_tokens
    if packed is not None and packed < longest:
        raise ConfigError(
            f"packed_sequence_length is {packed}, but a prompt and its title can have {longest} tokens "
            "(max_prompt_tokens + max_completion_tokens): ART would leave out longer ones. Raise it or unset it."
        )
    if packed is not None and packed > LOGPROB_CHUNK and packed % LOGPROB_CHUNK:
        raise ConfigError(f"packed_sequence_length above {LOGPROB_CHUNK} must be a multiple of it, got {packed}.")
    _check_gpus(profile)
    if profile.device != "cuda":
        return
    if profile.updates_per_step == "per_sequence" and not profile.art.sleep:
        raise ConfigError(
            "With updates_per_step = 'per_sequence' ART's own training runs, which lets vLLM sleep: set art.sleep to "
            "true, or updates_per_step to 'one'."
        )


def _check_gpus(profile: Profile) -> None:
    """Raise `ConfigError` for GPUs that ART's dedicated mode does not go by; it has one for each of its two parts."""
    trainer, inference = profile.art.trainer_gpus, profile.art.inference_gpus
    if not trainer and not inference:
        if profile.devices > 1:
            raise ConfigError(
                f"ART trains on one GPU, but the profile sets devices = {profile.devices}. Set it to 1; to give vLLM a "
                "GPU of its own, set art.trainer_gpus = [0] and art.inference_gpus = [1]."
            )
        return
    came = f"got art.trainer_gpus = {list(trainer)} and art.inference_gpus = {list(inference)}"
    if profile.device == "cpu":
        raise ConfigError(f"art.trainer_gpus and art.inference_gpus need device = 'cuda', but it is 'cpu': {came}.")
    if trainer != (0,) or len(inference) != 1 or inference == trainer:
        raise ConfigError(
            f"ART's dedicated mode trains on GPU 0 and has one other for vLLM, but {came}. Set both, such as [0] and "
            "[1], or leave both out."
        )
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None and shown.replace(" ", "").split(",")[: len(trainer)] != ["0"]:
        raise ConfigError(
            f"ART's dedicated mode counts all of the machine's GPUs, whatever CUDA_VISIBLE_DEVICES={shown} shows. "
            "Unset it, and name the GPUs in art.trainer_gpus and art.inference_gpus."
        )


def gpu_config(profile: Profile, context_tokens: int, packed: int | None) -> Any:
    """Return ART's internal configuration for a GPU, or one for each part: an `art.dev.InternalModelConfig`.

    `context_tokens` is what vLLM reads at once, `packed` the `packed_length`. Raises `ConfigError` for a rank that
    vLLM cannot serve.
    """
    import art

    dedicated: Any = {}
    if profile.art.trainer_gpus:
        dedicated = {
            "trainer_gpu_ids": list(profile.art.trainer_gpus),
            "inference_gpu_ids": list(profile.art.inference_gpus),
        }
    return art.dev.InternalModelConfig(
        init_args=art.dev.InitArgs(
            max_seq_length=packed or padded_text(profile),
            # ART's default is 4-bit weights, whose probabilities are not those that vLLM samples with.
            load_in_4bit=profile.art.load_in_4bit,
        ),
        # vLLM's share of the memory counts here; `init_args.gpu_memory_utilization` does not reach it.
        engine_args=art.dev.EngineArgs(
            gpu_memory_utilization=profile.art.vllm_memory_share,
            max_model_len=context_tokens,
            max_num_batched_tokens=VLLM_PASS_TOKENS,
            dtype="bfloat16",  # Unsloth's, whatever the files hold
            max_lora_rank=_vllm_rank(profile.lora_rank),
            # vLLM's own argument for the list is lost on the command line that ART makes: the last size alone counts.
            compilation_config={  # type: ignore[typeddict-unknown-key]
                "cudagraph_capture_sizes": graph_sizes(profile.rollout_concurrency)
            },
        ),
        peft_args=art.dev.PeftArgs(r=profile.lora_rank, lora_alpha=profile.lora_alpha, random_state=profile.seed),
        # ART's default optimiser, paged_adamw_8bit, takes CUDA managed memory; the plain 8-bit one does not.
        trainer_args=art.dev.TrainerArgs(max_grad_norm=profile.max_grad_norm, optim="adamw_8bit"),
        **dedicated,
    )


def graph_sizes(at_once: int) -> list[int]:
    """Return the batch sizes, in tokens, that vLLM captures CUDA graphs of for `at_once` titles in the making.

    Each is captured four times while the server starts. Up to `at_once`, the tokens that one step samples, they are
    vLLM's own; above, where ends of prompts are read in the same step, each is twice the one before.
    """
    sizes = list(VLLM_GRAPHS[: bisect_left(VLLM_GRAPHS, at_once) + 1])
    while sizes[-1] < VLLM_GRAPHS[-1]:
        sizes.append(min(2 * sizes[-1], VLLM_GRAPHS[-1]))
    return sizes


def server_config() -> Any:
    """Return ART's server configuration: the base weights get a name, by which the validator is asked."""
    import art

    return art.dev.OpenAIServerConfig(
        server_args={"host": "127.0.0.1", "served_model_name": BASE_MODEL_NAME}  # type: ignore[typeddict-unknown-key]
    )


def _vllm_rank(rank: int) -> int:
    for reserved in VLLM_RANKS:
        if rank <= reserved:
            return reserved
    raise ConfigError(f"vLLM serves adapters of rank {VLLM_RANKS[-1]} at most, but lora_rank is {rank}. Lower it.")


def _prepare_environment() -> None:
    # Before ART is imported: litellm would look up prices on the network, and wandb would report there.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WEAVE_DISABLED", "true")
    if os.environ.pop("WANDB_API_KEY", None):
        logger.info("WANDB_API_KEY is not used: metrics go to MLflow")
    vllm = Settings().art_vllm_runtime_bin
    if vllm:
        # From `.env`; ART itself reads only the environment.
        os.environ.setdefault("ART_VLLM_RUNTIME_BIN", vllm)
