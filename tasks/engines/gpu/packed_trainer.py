"""One update on a GPU from all packed sequences of a step, with the model and the optimiser that Unsloth made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from art.dev import TrainConfig as DevTrainConfig
from art.preprocessing.inputs import TrainInputs
from art.preprocessing.pack import PackedTensors
from art.types import TrainConfig
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.engines.adapter_files import trained_weights
from tasks.engines.packed_update import (
    Part,
    assistant_tokens,
    attention_bias,
    check_supported,
    part_of,
    place_logprobs,
    sequence_of,
    spoken_places,
    update_metrics,
)
from tasks.titles.packed_sequences import ALIGNED

KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The attention that takes any mask; cuDNN's, which does too, makes a new plan for every length that it sees."""


class PackedTrainer:
    """Trains the adapter of `model`, on the device where the model is.

    Unsloth's own way through a model takes no mask but the causal one: its causal language model puts ART's aside,
    and its decoder ignores one while it trains. So the decoder is called here, told that it does not train (its
    layers still do), and the head is applied only where the loss looks.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> None:
        self._model, self._optimizer = model, optimizer
        self._max_grad_norm = max_grad_norm
        language_model: Any = model.get_base_model()
        self._decoder = language_model.model
        self._head: torch.nn.Linear = language_model.get_output_embeddings()
        _recompute_layers(language_model)

    def update(self, packed: PackedTensors, config: TrainConfig, dev_config: DevTrainConfig) -> dict[str, float]:
        """Make one optimiser update over all assistant tokens of all sequences, and return its metrics.

        Raises `RunStopped` for an update that is not finite, which is not made, and `ConfigError` for options of
        ART's trainer that this one does not have.
        """
        check_supported(dev_config)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate
        try:
            parts = self.gradients(packed, config, dev_config)
            weights = list(trained_weights(self._model).values())
            norm = torch.nn.utils.clip_grad_norm_(weights, self._max_grad_norm).item()
            metrics = update_metrics(
                parts, norm=norm, learning_rate=config.learning_rate, with_reference=config.kl_penalty_coef > 0
            )
            self._optimizer.step()
            return metrics
        finally:
            self._optimizer.zero_grad(set_to_none=True)

    def gradients(self, packed: PackedTensors, config: TrainConfig, dev_config: DevTrainConfig) -> list[Part]:
        """Add the gradient of all sequences to the weights' own, and return each sequence's part in the figures."""
        sequences = [
            sequence_of(packed, number, config, dev_config, multiple=ALIGNED)
            for number in range(packed["tokens"].shape[0])
        ]
        tokens = sum(assistant_tokens(inputs) for inputs in sequences)
        with self._packed_attention():
            return [self._learn(self._on_device(inputs), tokens) for inputs in sequences]

    @torch.no_grad()
    def logprobs(self, packed: PackedTensors, number: int, config: TrainConfig) -> torch.Tensor:
        """Return log p(token | tokens before it) of the assistant's tokens in one sequence, in order, [tokens]."""
        inputs = self._on_device(sequence_of(packed, number, config, {}, multiple=ALIGNED))
        with self._packed_attention():
            return self._packed_logprobs(inputs)[0][0, spoken_places(inputs)]

    def _learn(self, inputs: TrainInputs, tokens: int) -> Part:
        reference = None
        if inputs["config"].kl_penalty_coef > 0:
            with torch.no_grad(), self._model.disable_adapter():
                reference, _ = self._packed_logprobs(inputs)
        loss, part = part_of(inputs, *self._packed_logprobs(inputs), reference, tokens)
        loss.backward()
        return part

    def _packed_logprobs(self, inputs: TrainInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of one packed sequence, as `place_logprobs` does."""
        places = spoken_places(inputs)
        weights = self._head.weight
        # What Unsloth loads computes in bfloat16; the head answers in float32, whose steps do not show in the loss.
        with torch.autocast(weights.device.type, torch.bfloat16, enabled=weights.dtype == torch.bfloat16):
            hidden = self._decoder(
                input_ids=inputs["tokens"],
                attention_mask=attention_bias(inputs["group_ids"], inputs["parent_ids"], weights.dtype),
                position_ids=inputs["input_pos"],
                use_cache=False,
            ).last_hidden_state
        logits = hidden[0, places].float() @ weights.float().T
        return place_logprobs(inputs, places, logits)

    def _on_device(self, inputs: TrainInputs) -> TrainInputs:
        device = self._head.weight.device
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        return cast(TrainInputs, moved)

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        """Let forward and backward passes go by the packing mask."""
        self._model.train()
        self._decoder.training = False
        # A packed sequence may be longer than a single one is allowed to be: its positions begin anew.
        self._decoder._unsloth_allow_packed_overlength = True
        try:
            with _keys_for_each_head(), sdpa_kernel(KERNELS):
                yield
        finally:
            self._decoder.training = True
            self._decoder._unsloth_allow_packed_overlength = False


def _recompute_layers(language_model: Any) -> None:
    """Have a backward pass compute each layer again, instead of the forward pass keeping all that it computed.

    Unsloth leaves this off until its own training has begun, which here it never does. At 0.5B's size an update of
    8 x 2,000 tokens then held 15 GB instead of 6.5.
    """
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not all(hasattr(layer, "_gradient_checkpointing_func") for layer in layers):
        language_model.gradient_checkpointing_enable()
    for layer in layers:
        layer.gradient_checkpointing = True


@contextmanager
def _keys_for_each_head() -> Iterator[None]:
    """Let Unsloth repeat keys and values for the heads that share them.

    Left to PyTorch, grouped heads with a mask have only the slow attention that holds all of its scores at once.
    """
    dispatch: Any = sys.modules.get("unsloth.utils.attention_dispatch")
    if dispatch is None:  # transformers' own decoder does so by itself where there is a mask
        yield
        return
    shared = dispatch.SDPA_HAS_GQA
    dispatch.SDPA_HAS_GQA = False
    try:
        yield
    finally:
        dispatch.SDPA_HAS_GQA = shared
