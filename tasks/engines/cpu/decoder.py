"""A Qwen2 forward pass in plain torch that lets many sequences share the keys and values of one prefix.

`transformers` keeps one cache row per sequence, so six titles of one article would hold and read the
article six times. Here a prefix is computed and held once, and each of its branches holds only what
comes after it. There is no padding on the left and no padding inside a prefix; tokens stand at their
true positions everywhere.

A row's numbers do not depend on which other rows are in the batch: prefixes are computed alone, and
matrix products get at least `LEAST_ROWS` rows, below which BLAS libraries choose kernels that add in
another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from tasks.engines.cpu.weights import DecoderWeights, LayerWeights

LEAST_ROWS = 16
CACHE_BLOCK = 32
"""Tokens by which a branch's cache grows; titles are about this long."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one token sequence, per layer [key-value heads, tokens, head size]."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    tokens: int


class Branches:
    """Sequences that continue one prefix, each with keys and values of its own."""

    def __init__(self, prefix: Prefix, rows: int) -> None:
        self.prefix = prefix
        self.lengths = [0] * rows
        """Own tokens per row, after the prefix."""
        heads, _, size = prefix.keys[0].shape
        self._heads, self._size = heads, size
        self._keys = [torch.empty(heads, rows, 0, size) for _ in prefix.keys]
        self._values = [torch.empty(heads, rows, 0, size) for _ in prefix.keys]

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    def keep(self, index: torch.Tensor) -> None:
        """Drop every row but those of `index`."""
        self.lengths = [self.lengths[place] for place in index.tolist()]
        self._keys = [keys[:, index] for keys in self._keys]
        self._values = [values[:, index] for values in self._values]

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [heads, rows, new tokens, size] behind each row's own tokens.

        `end` is the longest row's length with the new tokens. Returns views [heads, rows, end, size];
        what lies behind a shorter row's end in them is undefined but finite.
        """
        capacity = self._keys[layer].shape[2]
        if end > capacity:
            grown = (self._heads, self.rows, -(-end // CACHE_BLOCK) * CACHE_BLOCK - capacity, self._size)
            self._keys[layer] = torch.cat([self._keys[layer], torch.zeros(grown)], dim=2)
            self._values[layer] = torch.cat([self._values[layer], torch.zeros(grown)], dim=2)
        count = keys.shape[2]
        if self.even:
            start = self.lengths[0]
            self._keys[layer][:, :, start : start + count] = keys
            self._values[layer][:, :, start : start + count] = values
        else:
            rows = torch.arange(self.rows)[:, None]
            columns = torch.tensor(self.lengths)[:, None] + torch.arange(count)
            self._keys[layer][:, rows, columns] = keys
            self._values[layer][:, rows, columns] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    @property
    def even(self) -> bool:
        """Whether all rows hold the same number of own tokens."""
        return min(self.lengths) == max(self.lengths)


class Decoder:
    """Computes next-token logits; holds no state between calls."""

    def __init__(self, weights: DecoderWeights) -> None:
        self.weights = weights

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        return self.weights.context

    def prefill(self, token_ids: Sequence[int]) -> tuple[Prefix, torch.Tensor]:
        """Return the keys and values of `token_ids` and the logits [vocabulary] after the last of them."""
        hidden, prefix = self._forward(token_ids, last_only=True)
        return prefix, self._logits(hidden)[0]

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits [tokens, vocabulary] after each of `token_ids`."""
        return self._logits(self._forward(token_ids, last_only=False)[0])

    def extend(self, branches: Sequence[Branches], tokens: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """Append tokens to every row of `branches`, and return the logits [rows, vocabulary] after its last.

        `tokens` [rows, most new tokens] holds the rows of all branches one after the other, padded on
        the right with any token; `widths` [rows] says how many are real, at least one each.
        """
        weights = self.weights
        rows, count = tokens.shape
        size = weights.cosine.shape[1]
        flat = torch.zeros(max(rows * count, LEAST_ROWS), dtype=torch.long)
        flat[: rows * count] = tokens.reshape(-1)
        starts = torch.tensor([group.prefix.tokens + length for group in branches for length in group.lengths])
        positions = torch.zeros_like(flat)
        # A short row's padding may point beyond the context; its result is not used.
        positions[: rows * count] = (starts[:, None] + torch.arange(count)).clamp(max=self.context - 1).reshape(-1)
        cosine, sine = weights.cosine[positions], weights.sine[positions]
        masks = [_own_mask(group, count) for group in branches]
        hidden = weights.embedding[flat]
        for number, layer in enumerate(weights.layers):
            queries, keys, values = self._project(layer, hidden, cosine, sine)
            attended = torch.zeros(hidden.shape[0], weights.heads * size)
            start = 0
            for group, mask in zip(branches, masks, strict=True):
                end = start + group.rows * count
                attended[start:end] = _attend(
                    group, number, queries[start:end], keys[start:end], values[start:end], mask
                )
                start = end
            hidden = self._finish_layer(layer, hidden, attended)
        new = iter(widths.tolist())
        for group in branches:
            group.lengths = [length + next(new) for length in group.lengths]
        last = torch.arange(rows) * count + widths - 1
        # The spare rows keep the last product as wide as the others.
        spare = torch.zeros(max(rows, LEAST_ROWS), hidden.shape[1])
        spare[:rows] = hidden[last]
        return self._logits(spare)[:rows]

    def _forward(self, token_ids: Sequence[int], *, last_only: bool) -> tuple[torch.Tensor, Prefix]:
        weights = self.weights
        count = len(token_ids)
        hidden = weights.embedding[torch.tensor(token_ids)]
        cosine, sine = weights.cosine[:count], weights.sine[:count]
        repeats = weights.heads // weights.key_value_heads
        kept_keys, kept_values = [], []
        for layer in weights.layers:
            queries, keys, values = self._project(layer, hidden, cosine, sine)
            keys, values = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
            kept_keys.append(keys)
            kept_values.append(values)
            if last_only and layer is weights.layers[-1]:
                # Nothing reads the other positions of the last layer but their keys and values.
                queries, hidden = queries[-1:], hidden[-1:]
            attended = functional.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                keys.repeat_interleave(repeats, dim=0)[None],
                values.repeat_interleave(repeats, dim=0)[None],
                is_causal=queries.shape[0] == count and count > 1,
            )
            hidden = self._finish_layer(layer, hidden, attended[0].transpose(0, 1).reshape(hidden.shape[0], -1))
        return hidden, Prefix(tuple(kept_keys), tuple(kept_values), count)

    def _project(
        self, layer: LayerWeights, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [tokens, heads, size], keys and values [tokens, key-value heads, size], rotated."""
        weights = self.weights
        size = weights.cosine.shape[1]
        normed = functional.rms_norm(hidden, layer.input_norm.shape, layer.input_norm, weights.epsilon)
        mixed = functional.linear(normed, layer.qkv, layer.qkv_bias).view(hidden.shape[0], -1, size)
        turned = weights.heads + weights.key_value_heads
        half = size // 2
        plain = mixed[:, :turned]
        swapped = torch.cat([-plain[..., half:], plain[..., :half]], dim=-1)
        rotated = plain * cosine[:, None] + swapped * sine[:, None]
        return rotated[:, : weights.heads], rotated[:, weights.heads :], mixed[:, turned:]

    def _finish_layer(self, layer: LayerWeights, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden = hidden + functional.linear(attended, layer.output)
        normed = functional.rms_norm(hidden, layer.post_norm.shape, layer.post_norm, self.weights.epsilon)
        gate, up = functional.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return hidden + functional.linear(functional.silu(gate) * up, layer.down)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(hidden, self.weights.norm.shape, self.weights.norm, self.weights.epsilon)
        return functional.linear(normed, self.weights.head)


def _own_mask(group: Branches, count: int) -> torch.Tensor | None:
    """Return what each new token may not see of its row's own tokens, [rows, count, columns], or None for nothing."""
    if count == 1 and group.even:
        return None
    newest = torch.tensor(group.lengths)[:, None] + torch.arange(count)
    columns = torch.arange(max(group.lengths) + count)
    return columns > newest[:, :, None]


def _attend(
    group: Branches,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention output [rows · count, heads · size] of one group's new tokens."""
    rows = group.rows
    tokens, heads, size = queries.shape
    count = tokens // rows
    shared = keys.shape[1]
    repeats = heads // shared
    # Query heads that share a key head become further rows of one product.
    asked = queries.view(rows, count, shared, repeats, size).permute(2, 0, 1, 3, 4).reshape(shared, rows, -1, size)
    asked = asked * size**-0.5
    end = max(group.lengths) + count
    own_keys, own_values = group.write(
        layer,
        keys.view(rows, count, shared, size).permute(2, 0, 1, 3),
        values.view(rows, count, shared, size).permute(2, 0, 1, 3),
        end,
    )
    before = _wide_product(asked.flatten(1, 2), group.prefix.keys[layer].transpose(1, 2))
    own = asked @ own_keys.transpose(2, 3)
    if mask is not None:
        own = own.masked_fill(mask.repeat_interleave(repeats, dim=1), float("-inf"))
    scores = torch.cat([before.view(shared, rows, count * repeats, -1), own], dim=-1)
    shares = scores.softmax(dim=-1)
    of_prefix, of_own = shares.split([group.prefix.tokens, end], dim=-1)
    result = _wide_product(of_prefix.flatten(1, 2), group.prefix.values[layer]).view_as(asked) + of_own @ own_values
    return result.view(shared, rows, count, repeats, size).permute(1, 2, 0, 3, 4).reshape(tokens, -1)


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right` ([heads, rows, …]), computed with at least `LEAST_ROWS` rows."""
    rows = left.shape[1]
    if rows < LEAST_ROWS:
        left = functional.pad(left, (0, 0, 0, LEAST_ROWS - rows))
    return (left @ right)[:, :rows]
