"""What a profile means to TRL: the arguments of its trainer, and how the trainer's process is started."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from pathlib import Path
from typing import Any

from tasks.engines.trl_engine.gpus import free_port, visible_gpus
from tasks.titles.config import Profile
from tasks.titles.errors import ConfigError

logger = logging.getLogger(__name__)

PROCESS = "tasks.engines.trl_engine.process"
"""The module that trains."""
CISPO_LARGEST_RATIO = 5.0
"""Where CISPO cuts the importance ratio: ART's bound (1 + 4), and the one TRL recommends. TRL's own default is 0.2,
meant for the other losses; under CISPO it would multiply every gradient by 0.2."""
SAID_TO_UNSLOTH = {
    "mask_truncated_completions": False,
    "epsilon_high": 0.2,
    "vllm_importance_sampling_correction": True,
}
"""What TRL does where nothing is said. Unsloth would leave titles out that were cut off, clip at 0.28, and not correct
the loss for what sampler and trainer differ by."""


def check_trl_settings(profile: Profile, *, vllm_server_url: str | None = None) -> None:
    """Raise `ConfigError` for settings that TRL would not follow, saying which it would.

    `vllm_server_url` is the address in the settings, needed for `trl.vllm_mode = 'server'` alone. What only ART
    reads (`packed_sequence_length`, `updates_per_step`) is no mistake here: TRL always makes one update a step.
    """
    if profile.device == "cpu":
        on_gpu_alone = {
            "trl.unsloth": profile.trl.unsloth,
            "trl.vllm_mode = 'server'": profile.trl.vllm_mode == "server",
        }
        wrong = [name for name, is_set in on_gpu_alone.items() if is_set]
        if wrong:
            raise ConfigError(
                f"TRL trains on a CPU without Unsloth and vLLM, but the profile sets {', '.join(wrong)}. "
                "Leave that out, or set device = 'cuda'."
            )
    if profile.trl.unsloth:
        _check_unsloth(profile)
    _check_gpus(profile)
    if profile.trl.vllm_mode == "server" and not profile.trl.server_gpus and vllm_server_url is None:
        raise ConfigError(
            "trl.vllm_mode = 'server' needs a server. Set trl.server_gpus and trl.trainer_gpus, and the run starts it; "
            "or start VLLM_SERVER_DEV_MODE=1 vllm serve "
            f'{profile.base_model} --weight-transfer-config \'{{"backend": "nccl"}}\' '
            "--logprobs-mode processed_logprobs --max-logprobs -1 on another GPU and set VLLM_SERVER_URL; "
            "or set trl.vllm_mode to 'colocate'."
        )
    _check_batch(profile)
    if profile.trl.warmup_steps > profile.max_steps:
        logger.warning(
            "The learning rate rises for trl.warmup_steps = %d steps, but the run ends after %d and never reaches it. "
            "Lower trl.warmup_steps where that is not meant.",
            profile.trl.warmup_steps,
            profile.max_steps,
        )


def _check_unsloth(profile: Profile) -> None:
    if profile.trl.vllm_mode == "server":
        raise ConfigError(
            "Unsloth generates with a vLLM of its own, but the profile sets trl.vllm_mode = 'server'. "
            "Set it to 'colocate', or trl.unsloth to false."
        )
    if profile.devices > 1:
        raise ConfigError(
            f"Unsloth trains on one GPU with vLLM in the same process, but the profile sets devices = "
            f"{profile.devices}. Set it to 1, or trl.unsloth to false."
        )


def _check_gpus(profile: Profile) -> None:
    """Raise `ConfigError` where the GPUs of trainer and server are not told apart."""
    trainer, server = profile.trl.trainer_gpus, profile.trl.server_gpus
    if profile.trl.vllm_mode == "colocate" and server:
        raise ConfigError(
            f"trl.server_gpus = {list(server)} are for a vLLM server, but trl.vllm_mode is 'colocate'. Set it to "
            "'server', or leave trl.server_gpus out."
        )
    if server and not trainer:
        raise ConfigError(
            f"trl.server_gpus = {list(server)} are the server's alone: name the trainer's in trl.trainer_gpus, one for "
            f"each of {profile.devices} device(s)."
        )
    if trainer and len(trainer) != profile.devices:
        raise ConfigError(
            f"trl.trainer_gpus = {list(trainer)} must name one GPU for each of devices = {profile.devices}. Set one "
            "of them to fit the other."
        )
    if len({*trainer, *server}) < len(trainer) + len(server):
        raise ConfigError(
            f"trl.trainer_gpus = {list(trainer)} and trl.server_gpus = {list(server)} must name each GPU once: the "
            "server and every process of the trainer have one of their own."
        )


def grpo_arguments(
    profile: Profile, *, steps: int, output_dir: Path, vllm_server_url: str | None = None
) -> dict[str, Any]:
    """Return keyword arguments of `trl.GRPOConfig` for a sitting of `steps` policy updates.

    One update is made of `groups_per_step` x `group_size` titles, generated at once. The caller hands TRL its
    own optimiser and schedule and the rows in their final order, as long as the sitting. Raises `ConfigError` as
    `check_trl_settings` does.
    """
    check_trl_settings(profile, vllm_server_url=vllm_server_url)
    passes = _titles(profile) // (profile.devices * _micro_batch(profile))
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "seed": profile.seed,
        # one update a step, on titles of the present policy
        "per_device_train_batch_size": _micro_batch(profile),
        "gradient_accumulation_steps": passes,
        "steps_per_generation": passes,
        "num_generations": profile.group_size,
        "num_iterations": 1,
        # sampling
        "max_completion_length": profile.max_completion_tokens,
        "temperature": profile.temperature,
        "top_p": profile.top_p,
        "top_k": profile.top_k,
        "min_p": profile.min_p,
        # loss and update; the optimiser brings the rest
        "loss_type": profile.loss.trl,
        "scale_rewards": "group",
        "beta": profile.kl_beta,
        "learning_rate": profile.learning_rate.trl,
        "max_grad_norm": profile.max_grad_norm,
        # the rows come as they are, in the order of the data cursor, in the trainer's own process
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,  # rows are texts
        # the run's own journal, checkpoints and progress take the place of these
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_completions": False,
        # every step is logged as it is: by default a loss that is not a number appears as the mean of the others
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    if profile.devices > 1:
        # Every pass uses every LoRA weight; the search for unused ones walks the whole graph at each pass.
        arguments["ddp_find_unused_parameters"] = False
    arguments |= _cpu_arguments() if profile.device == "cpu" else _cuda_arguments(profile, vllm_server_url)
    if profile.loss.trl == "cispo":
        arguments["epsilon_high"] = CISPO_LARGEST_RATIO
    return arguments


def _cpu_arguments() -> dict[str, Any]:
    return {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def _cuda_arguments(profile: Profile, vllm_server_url: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "bf16": True,
        "use_vllm": True,
        "vllm_mode": profile.trl.vllm_mode,
        # Prompts of 8,000 tokens need it: what a pass must remember otherwise outgrows the GPU beside vLLM.
        "gradient_checkpointing": True,
    }
    if profile.trl.vllm_mode == "server":
        # The port is where trainer and server meet to pass weights on. A fixed one would be for one run at a time.
        return {**arguments, "vllm_server_base_url": vllm_server_url, "vllm_group_port": free_port()}
    if profile.trl.unsloth:
        # Unsloth makes the engine with the model, where its share of the memory and its length are given.
        return {**arguments, **SAID_TO_UNSLOTH}
    return {
        **arguments,
        "vllm_gpu_memory_utilization": profile.trl.vllm_memory_share,
        "vllm_max_model_length": profile.max_prompt_tokens + profile.max_completion_tokens,
        # its memory is the trainer's during the update
        "vllm_enable_sleep_mode": profile.trl.vllm_sleep,
        # TRL reads token ids alone. In this process nothing else goes on while vLLM would write them out as text.
        "generation_kwargs": {"detokenize": False},
    }


def optimizer_settings(profile: Profile) -> dict[str, Any]:
    """Return `name` ('adamw_torch' or 'adamw_8bit'), `betas` and `weight_decay` of the optimiser.

    On a GPU it is bitsandbytes' 8-bit AdamW, which makes the same updates as the published experiment's paged one.
    Paging would keep its state in CUDA managed memory, which not every GPU machine grants and which saves nothing
    here: the state of a LoRA adapter of rank 8 takes some megabytes.
    """
    name = "adamw_torch" if profile.device == "cpu" else "adamw_8bit"
    return {"name": name, "betas": (0.9, 0.99), "weight_decay": 0.1}


def lora_arguments(profile: Profile) -> dict[str, Any]:
    """Return keyword arguments of `peft.LoraConfig`, the same adapter as ART's on a CPU."""
    return {
        "r": profile.lora_rank,
        "lora_alpha": profile.lora_alpha,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Return what the learning rate is multiplied by for the update that makes checkpoint `step` (from 1).

    It rises in equal parts and is 1 from step `warmup_steps` on. Steps are the run's own, so a run that was
    continued warms up like one that was not.
    """
    return min(1.0, step / max(warmup_steps, 1))


def launch_command(profile: Profile, request_path: Path, python: Path | None = None) -> list[str]:
    """Return the command that trains what `request_path` asks for, on one device or through `accelerate launch`.

    `python` is that of the trainer's environment; None: this one. Further arguments of the process can be put
    behind it.
    """
    process = ["-m", PROCESS, str(request_path)]
    program = str(python or sys.executable)
    if profile.devices == 1:
        return [program, *process]
    # Each value is given, so that a configuration in the user's home decides none.
    options = {
        "num_processes": profile.devices,
        "num_machines": 1,
        "machine_rank": 0,
        "gpu_ids": "all",  # of those that CUDA_VISIBLE_DEVICES shows
        "main_process_port": 0,  # any free one, so that two runs can share a machine
        "mixed_precision": "no" if profile.device == "cpu" else "bf16",
        "dynamo_backend": "no",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    # `--multi_gpu` means torchrun on this machine, with or without a GPU; `--cpu` would ask for MPI.
    return [program, "-m", "accelerate.commands.launch", "--multi_gpu", *flags, *process]


def trainer_environment(profile: Profile) -> dict[str, str]:
    """Return the environment variables that the trainer's process needs besides those it inherits."""
    variables = {
        # The log is read while it grows, and must be whole when the process is killed or crashes in native code.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # Threads that spin while they wait take the cores from the reward server.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Libraries fork after the tokenizer has been used; its threads do not survive that.
        "TOKENIZERS_PARALLELISM": "false",
        # Bars are for terminals, and this output is a log file.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        # A notice that TRL prints where something, such as Unsloth, imports its experimental part.
        "TRL_EXPERIMENTAL_SILENCE": "1",
        # Nothing of a run leaves for another's server; wandb is installed because ART imports it.
        "WANDB_MODE": "disabled",
        "WANDB_ERROR_REPORTING": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if profile.device == "cuda":
        variables |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if importlib.util.find_spec("flashinfer") is None:
            # vLLM looks for flashinfer's sampler without asking whether it is there.
            variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if profile.trl.trainer_gpus:
            variables |= visible_gpus(profile.trl.trainer_gpus)
        if profile.trl.server_gpus:
            # Trainer and server meet on this machine; vLLM looks for an address that others reach it by.
            variables["VLLM_HOST_IP"] = "127.0.0.1"
    if profile.trl.unsloth:
        variables["UNSLOTH_DISABLE_STATISTICS"] = "1"
    return variables


def _titles(profile: Profile) -> int:
    """The titles of one step."""
    return profile.groups_per_step * profile.group_size


def _micro_batch(profile: Profile) -> int:
    """The titles of one pass on one device: no more than a step has for it."""
    return min(profile.trl.micro_batch, max(1, _titles(profile) // profile.devices))


def _check_batch(profile: Profile) -> None:
    titles, devices = _titles(profile), profile.devices
    step = f"A step of {profile.groups_per_step} x {profile.group_size} = {titles} titles"
    if titles % devices:
        multiple = devices // math.gcd(devices, profile.group_size)
        raise ConfigError(
            f"{step} cannot be shared equally by {devices} devices. Set groups_per_step to a multiple of {multiple}, "
            f"or devices to one of {_divisors(titles)}."
        )
    share = titles // devices
    if share % _micro_batch(profile):
        raise ConfigError(
            f"{step} is {share} for each of {devices} device(s), which is no multiple of trl.micro_batch = "
            f"{profile.trl.micro_batch}. Set it to one of {_divisors(share)}."
        )


def _divisors(number: int) -> str:
    return ", ".join(str(part) for part in range(1, number + 1) if number % part == 0)
