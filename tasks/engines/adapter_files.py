"""A checkpoint's files: the adapter in PEFT's form and the state of its optimiser. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tasks.titles.errors import CheckpointError

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, OPTIMIZER_FACTS = "optimizer.safetensors", "optimizer.json"
NUMBERS = "numbers"
"""Where `OPTIMIZER_FACTS` holds what an optimiser keeps as a plain number."""


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter that is being trained into `folder`; others of the model stay behind."""
    model.save_pretrained(str(folder), selected_adapters=[model.active_adapter])


def save_training(
    model: PeftModel, optimizer: torch.optim.Optimizer, folder: Path, facts: Mapping[str, object]
) -> None:
    """Write the adapter and its optimiser's state into `folder`; `facts` and errors are those of `save_optimizer`."""
    save_adapter(model, folder)
    save_optimizer(model, optimizer, folder, facts)


def save_optimizer(
    model: PeftModel, optimizer: torch.optim.Optimizer, folder: Path, facts: Mapping[str, object]
) -> None:
    """Write the state of the adapter's optimiser into `folder`, and `facts` of the optimiser for readers.

    The state may be of any optimiser that keeps tensors and numbers per weight; it is stored under the
    weight's name, in the type that it has. Raises `TypeError` for a state that is neither.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for name, weight in trained_weights(model).items():
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, torch.Tensor):
                # A copy each: an 8-bit optimiser's quantisation maps are one tensor for all weights.
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
            elif isinstance(value, int | float):
                numbers[f"{name}/{key}"] = value
            else:
                raise TypeError(f"{type(optimizer).__name__} keeps a {type(value).__name__} as '{key}' of {name}.")
    save_file(tensors, folder / OPTIMIZER)
    text = json.dumps({**facts, NUMBERS: numbers}, indent=2)
    (folder / OPTIMIZER_FACTS).write_text(text + "\n", encoding="utf-8")


def load_training(
    model: PeftModel, optimizer: torch.optim.Optimizer, folder: Path, *, lora_rank: int, lora_alpha: int
) -> None:
    """Take adapter and optimiser state from a checkpoint; the optimiser's own settings stay as they are.

    Raises `CheckpointError` where they are missing or are those of another adapter.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        adapter = load_file(folder / ADAPTER)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error
    wanted = {"r": lora_rank, "lora_alpha": lora_alpha}
    found = {key: config.get(key) for key in wanted}
    if found != wanted:
        raise CheckpointError(
            f"{folder} holds an adapter with {found}, but the profile asks for {wanted}. "
            "Resume with the settings that the run began with, or start it under another name."
        )
    weights = trained_weights(model)
    outcome: Any = set_peft_model_state_dict(model, adapter, adapter_name=model.active_adapter)
    strangers = [key for key in outcome.missing_keys if key in weights] + outcome.unexpected_keys
    if strangers:
        raise CheckpointError(f"{folder} holds the adapter of another model: {strangers[:3]}")
    load_optimizer(model, optimizer, folder)


def load_optimizer(model: PeftModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take the optimiser's state from a checkpoint; its own settings stay as they are.

    Raises `CheckpointError` where it is missing or is that of another adapter's optimiser.
    """
    try:
        tensors = load_file(folder / OPTIMIZER)
        numbers = json.loads((folder / OPTIMIZER_FACTS).read_text(encoding="utf-8")).get(NUMBERS, {})
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error
    weights = trained_weights(model)
    state: dict[str, dict[str, Any]] = {}
    for place, value in {**tensors, **numbers}.items():
        name, _, key = place.rpartition("/")
        # A copy: what safetensors reads is the file itself, mapped into memory.
        state.setdefault(name, {})[key] = value.clone() if isinstance(value, torch.Tensor) else value
    if state.keys() - weights.keys():
        raise CheckpointError(
            f"{folder} holds an optimiser of other weights: {sorted(state.keys() - weights.keys())[:3]}"
        )
    _restore(optimizer, {weights[name]: values for name, values in state.items()})


def trained_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the weights that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _restore(optimizer: torch.optim.Optimizer, state: Mapping[torch.nn.Parameter, dict[str, Any]]) -> None:
    """Give `optimizer` this state and no other.

    The optimiser decides on which device each part lies (AdamW's step count stays on the CPU, unless it
    is fused); its dtype is that of the file, where torch would cast it to the weight's.
    """
    groups = optimizer.state_dict()["param_groups"]
    numbered = {
        number: weight
        for group, numbers in zip(optimizer.param_groups, groups, strict=True)
        for weight, number in zip(group["params"], numbers["params"], strict=True)
    }
    known = {number: dict(state[weight]) for number, weight in numbered.items() if weight in state}
    optimizer.load_state_dict({"state": known, "param_groups": groups})
    for weight, values in state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                optimizer.state[weight][key] = value.to(optimizer.state[weight][key].device)
