"""The shape of a decoder-only model, and what follows from it exactly: parameters, LoRA weights, key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.titles.errors import ConfigError

FAMILIES = ("qwen2", "llama", "mistral", "qwen3")
"""Model types of this one layout: grouped-query attention, a gated MLP of three matrices, two norms a layer."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide how much memory a model takes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    tied: bool
    """Whether the output layer is the table of embeddings."""
    attention_bias: bool
    """Whether queries, keys and values have a bias."""
    head_norms: bool
    """Whether queries and keys are normed, head by head."""

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the linear layers of one layer: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        into = ((self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden))
        wide = (self.hidden, self.intermediate)
        return (*into, wide, wide, (self.intermediate, self.hidden))

    @property
    def embeddings(self) -> int:
        """Parameters of the table of embeddings."""
        return self.vocabulary * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Parameters of all layers' matrices, which 4-bit loading compresses."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections)

    @property
    def parameters(self) -> int:
        """All parameters, the output layer counted once where it is the table of embeddings."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.attention_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        output = 0 if self.tied else self.embeddings
        return self.embeddings + output + self.linear_parameters + self.layers * (biases + norms) + self.hidden

    def kv_bytes_per_token(self, bytes_each: int = 2) -> int:
        """Return the bytes of one token's keys and values in all layers; 2 bytes a number are 16-bit floats."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_each

    def lora_parameters(self, rank: int) -> int:
        """Return the parameters of a LoRA adapter on all linear layers but the output layer.

        A matrix of `n` inputs and `m` outputs gets two of `n x rank` and `rank x m` (Hu et al. 2021).
        """
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.projections)


def read_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """Return the shape that a model's config.json tells; `source` is where it comes from.

    Raises `ConfigError` for a model of another layout or a config that lacks a size.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"The size of {source} is not known: its model_type is {family!r}. Expected one of {', '.join(FAMILIES)}."
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return ModelShape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            # Qwen2 has the bias always and says nothing of it.
            attention_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
            head_norms=family == "qwen3",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"The config.json of {source} lacks a size that memory follows from: {error}.") from error
