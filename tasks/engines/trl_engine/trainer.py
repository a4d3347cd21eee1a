"""One sitting of TRL's `GRPOTrainer`: from the last committed step to the last one of the run.

Hugging Face's counters begin at 0 in every sitting. What a sitting continues from is not their checkpoint but
this project's: adapter and optimiser as the ART engine keeps them, and the data cursor, from which the rows of
the sitting are drawn in order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from tasks.engines.adapter_files import load_training
from tasks.engines.context import context_tokens
from tasks.engines.contract import TrainingRequest
from tasks.engines.cpu.cores import Cores, usable_cores
from tasks.engines.ledger import Ledger
from tasks.engines.resume import adapter_folder, engine_folder, stored_state
from tasks.engines.training_state import TrainingState, first_state
from tasks.engines.trl_engine.arguments import grpo_arguments, lora_arguments, optimizer_settings, warmup_factor
from tasks.engines.trl_engine.merged_weights import push_merged_weights
from tasks.engines.trl_engine.reward import TitleRewards
from tasks.engines.trl_engine.sampler import CpuGeneration, install
from tasks.engines.trl_engine.sampler_correction import correct_in_the_update
from tasks.engines.trl_engine.seeds import TitleSeeds
from tasks.engines.trl_engine.steps import StepCallback
from tasks.engines.trl_engine.validator import LocalValidator
from tasks.titles.config import Profile, Settings
from tasks.titles.errors import ConfigError
from tasks.titles.story import Prompt

logger = logging.getLogger(__name__)


def train(request: TrainingRequest, mlflow_run_id: str) -> None:
    """Train to `max_steps` and commit every step; `launch` has brought the run's directory in order.

    Raises `RunStopped` (too many failed trajectories, nothing to train on, sampler and trainer disagree).
    """
    disable_progress_bar()
    # Fewer stories than a step has groups make smaller steps, as they do under ART.
    groups = min(request.profile.groups_per_step, len(request.train))
    profile = request.profile.model_copy(update={"groups_per_step": groups})
    stored = stored_state(request.run_dir, "trl")
    state = stored or first_state(request, mlflow_run_id)
    model, tokenizer = load_policy(request)
    optimizer = make_optimizer(model, profile)
    if stored:
        load_training(
            model,
            optimizer,
            adapter_folder(request.run_dir, "trl", state.cursor.step),
            lora_rank=profile.lora_rank,
            lora_alpha=profile.lora_alpha,
        )
    done, steps = state.cursor.step, profile.max_steps - state.cursor.step
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda number: warmup_factor(done + number + 1, profile.trl.warmup_steps)
    )
    seeds = TitleSeeds(profile, tokenizer)
    prompts = {prompt.story.id: prompt for prompt in (*request.train, *request.val)}
    rewards = TitleRewards(
        stories=prompts,
        validator=LocalValidator(model, tokenizer),
        reward_model_url=request.reward_model_url,
        reward_model_api_key=request.reward_model_api_key,
        max_failed_share=profile.max_failed_share,
    )
    # Processes on one CPU share its cores.
    cores = Cores(max(1, usable_cores() // profile.devices))
    try:
        callback = StepCallback(request, Ledger(request, state), rewards, seeds, optimizer)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[rewards],
            args=GRPOConfig(
                **grpo_arguments(
                    profile,
                    steps=steps,
                    output_dir=engine_folder(request.run_dir, "trl"),
                    vllm_server_url=Settings().vllm_server_url,
                )
            ),
            train_dataset=draw_rows(state, request.train, profile, steps),
            processing_class=tokenizer,
            callbacks=[callback],
            optimizers=(optimizer, scheduler),
        )
        # TRL's loss is divided by the number of passes already, and accelerate's `backward` would divide it once more
        # (transformers issue 40709): `max_grad_norm` would mean something else than it does for ART.
        trainer.accelerator.gradient_accumulation_steps = 1
        if profile.device == "cpu":
            generation = CpuGeneration(
                model,
                max_tokens=profile.max_completion_tokens,
                seed_of=seeds.seed,
                cores=cores,
                process_index=trainer.accelerator.process_index,
            )
            install(trainer, generation)
        elif not profile.trl.unsloth:  # whose vLLM shares the trainer's base weights and loads adapters
            push_merged_weights(trainer)
        if not profile.trl.unsloth:  # which writes a trainer of its own
            correct_in_the_update(trainer)
        callback.attach(trainer)
        if stored is None:
            callback.start()
        trainer.train()
    finally:
        rewards.close()
        cores.close()


def load_policy(request: TrainingRequest) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return the base model with a fresh adapter, its seed the profile's, and the tokenizer."""
    profile = request.profile
    torch.manual_seed(profile.seed)
    if profile.trl.unsloth:
        return _load_with_unsloth(request)
    tokenizer = AutoTokenizer.from_pretrained(request.base_model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(
        request.base_model,
        dtype=torch.float32 if profile.device == "cpu" else torch.bfloat16,
        device_map=None if profile.device == "cpu" else {"": int(os.environ.get("LOCAL_RANK", "0"))},
        use_safetensors=True,
    )
    model = get_peft_model(base, LoraConfig(**lora_arguments(profile)))
    _check_dropout(base)
    return model, tokenizer


def _load_with_unsloth(request: TrainingRequest) -> tuple[Any, Any]:
    # `process` has imported it before everything else.
    from unsloth import FastLanguageModel

    _compile_a_chunk_alone()
    profile = request.profile
    model, tokenizer = FastLanguageModel.from_pretrained(
        request.base_model,
        # Unsloth cuts off what is longer, and the validator reads more than the policy.
        max_seq_length=context_tokens(request.base_model, profile),
        dtype=torch.bfloat16,
        # The validator and the sampler use these very weights; 4-bit ones would be another model's probabilities.
        load_in_4bit=False,
        fast_inference=True,
        max_lora_rank=profile.lora_rank,
        gpu_memory_utilization=profile.trl.vllm_memory_share,
    )
    adapter = {key: value for key, value in lora_arguments(profile).items() if key != "task_type"}
    model = FastLanguageModel.get_peft_model(
        model, use_gradient_checkpointing="unsloth", random_state=profile.seed, **adapter
    )
    return model, tokenizer


def _compile_a_chunk_alone() -> None:
    """Let Unsloth compile the log-probabilities of one chunk, instead of those of all chunks of a pass in one graph.

    A pass has four chunks for each of its titles, and scoring a step's titles is one pass: 192 chunks by default. One
    graph of them took 3 to 5 s of compilation a chunk on two cores, so the first step took many minutes. Unsloth has
    both ways; this one, which its UNSLOTH_GRPO_LOGPROB_RECOMPUTE asks for in the update alone, holds less memory
    besides.
    """
    from unsloth_zoo import rl_replacements

    rl_replacements.chunked_hidden_states_selective_log_softmax = (
        rl_replacements.chunked_hidden_states_selective_log_softmax_recompute
    )


def _check_dropout(model: Any) -> None:
    """Raise `ConfigError` for a base model with dropout: its sampler and its trainer would be two models."""
    active = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if active or getattr(model.config, "attention_dropout", False):
        raise ConfigError("The base model has dropout: set it to 0 in its config.json, or choose another model.")


def make_optimizer(model: PeftModel, profile: Profile) -> torch.optim.Optimizer:
    """Return the optimiser of the adapter's weights."""
    settings = dict(optimizer_settings(profile))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if settings.pop("name") == "adamw_torch":
        return torch.optim.AdamW(weights, lr=profile.learning_rate.trl, **settings)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=profile.learning_rate.trl, **settings)  # type: ignore[no-any-return]


def draw_rows(state: TrainingState, stories: Sequence[Prompt], profile: Profile, steps: int) -> Dataset:
    """Return the rows of `steps` steps from the cursor on: a story's id and chat, each story once.

    TRL repeats each row for its group. The chats are looked up when a row is read: a long run's rows hold
    nothing but ids.
    """
    ids: list[str] = []
    cursor = state.cursor
    for _ in range(steps):
        batch, cursor = cursor.next_batch(stories, profile.groups_per_step)
        ids += [prompt.story.id for prompt in batch]
    chats = {prompt.story.id: list(prompt.messages) for prompt in stories}
    rows = Dataset.from_dict({"story_id": ids})
    rows.set_transform(lambda part: {**part, "prompt": [chats[story_id] for story_id in part["story_id"]]})
    return rows
