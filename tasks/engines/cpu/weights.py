"""The sampler's own copies of the weights: the base model, and adapters merged into it.

The sampler never reads the trainer's tensors. An adapter comes from its checkpoint on disk, as it
would in a server of its own, so that what the canary compares has gone the whole way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from tasks.titles.errors import CheckpointError, ConfigError

StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One transformer block; projections that read the same input are stacked into one matrix."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    output: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class DecoderWeights:
    """A whole Qwen2 model in float32, with the rotary table of every position of its context."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    cosine: torch.Tensor
    """[context, head size], as is `sine`."""
    sine: torch.Tensor
    heads: int
    key_value_heads: int
    epsilon: float

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        return self.cosine.shape[0]


def check_supported(config: PreTrainedConfig) -> None:
    """Raise `ConfigError` for a model that the CPU service cannot serve exactly."""
    wanted = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}
    wrong = {key: getattr(config, key, None) for key, value in wanted.items() if getattr(config, key, None) != value}
    if wrong:
        raise ConfigError(
            f"The CPU service serves models with {wanted}, but this one has {wrong}. "
            "Choose a Qwen2 model without a sliding window, or train on a GPU."
        )


def copy_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a float32 copy of a model's weights that shares no memory with it."""
    state = {key: value.detach().to(torch.float32, copy=True) for key, value in model.state_dict().items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return state


def merge_adapter(base: StateDict, folder: Path) -> dict[str, torch.Tensor]:
    """Return `base` with the PEFT LoRA adapter in `folder` added: W + alpha / rank · B A.

    Raises `CheckpointError` for a folder that holds no plain LoRA adapter of this model.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        adapter = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable LoRA adapter: {error}") from error
    unusual = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or unusual:
        raise CheckpointError(f"{folder} is no plain LoRA adapter: peft_type {config.get('peft_type')}, {unusual}.")
    scale = config["lora_alpha"] / config["r"]
    merged = dict(base)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    for key, down in adapter.items():
        if not key.endswith(suffix):
            continue
        stem = key.removesuffix(suffix)
        target = f"{stem.removeprefix(prefix)}.weight"
        up = adapter.get(f"{stem}.lora_B.weight")
        if (
            target not in base
            or up is None
            or up.shape[0] != base[target].shape[0]
            or down.shape[1] != base[target].shape[1]
        ):
            raise CheckpointError(
                f"{folder}: '{key}' fits no weight of the base model; it is the adapter of another model."
            )
        merged[target] = base[target] + scale * (up.float() @ down.float())
    return merged


def decoder_weights(state: StateDict, config: PreTrainedConfig) -> DecoderWeights:
    """Arrange a Qwen2 state dict (Hugging Face names) for `Decoder`."""
    layers = []
    for number in range(config.num_hidden_layers):
        name = f"model.layers.{number}."
        attention, mlp = f"{name}self_attn.", f"{name}mlp."
        layers.append(
            LayerWeights(
                input_norm=state[f"{name}input_layernorm.weight"],
                qkv=torch.cat([state[f"{attention}{part}_proj.weight"] for part in "qkv"]),
                qkv_bias=torch.cat([state[f"{attention}{part}_proj.bias"] for part in "qkv"]),
                output=state[f"{attention}o_proj.weight"],
                post_norm=state[f"{name}post_attention_layernorm.weight"],
                gate_up=torch.cat([state[f"{mlp}gate_proj.weight"], state[f"{mlp}up_proj.weight"]]),
                down=state[f"{mlp}down_proj.weight"],
            )
        )
    positions = torch.arange(config.max_position_embeddings)[None]
    cosine, sine = Qwen2RotaryEmbedding(cast(Qwen2Config, config))(torch.zeros(1, dtype=torch.float32), positions)
    return DecoderWeights(
        embedding=state["model.embed_tokens.weight"],
        layers=tuple(layers),
        norm=state["model.norm.weight"],
        head=state["lm_head.weight"],
        cosine=cosine[0],
        sine=sine[0],
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        epsilon=config.rms_norm_eps,
    )
