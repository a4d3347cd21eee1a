"""The forward passes of a decoder classifier; what texts have in common at their beginning is computed once.

The first pass reads the stems, a row each: a prefix that several texts share, or a whole text that shares nothing. They
are padded on the right and need no mask: a token sees only those before it, never the padding behind. The second pass
reads the rests of the texts (branches) on top of the stems' keys and values. All branches of a stem lie side by side in
its row, so that the keys and values are not copied; a mask shows each branch its stem and itself, and its positions go
on where the stem ends. A text's score is read at its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from tasks.titles.prefixes import Run

_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_PADDING = -1


def why_no_passes(classifier: Any, max_length: int) -> str | None:
    """Return why `classifier` cannot be computed by `DecoderPasses`, None where nothing speaks against it.

    What its configuration does not tell (an encoder, a pooling of its own, positions of its own) is seen when scores
    are compared.
    """
    config = classifier.config
    if not hasattr(classifier, "score"):
        return "it does not read its score at the last token (it has no 'score' layer)"
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window is not None and window < max_length:
            return f"its attention reaches back {window} tokens only ({name})"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
        return f"its positions depend on the longest text of a batch (rope_type {rope['rope_type']})"
    return None


class DecoderPasses:
    """Scores sorted texts, grouped into runs."""

    def __init__(self, classifier: Any, *, pad_id: int, device: str) -> None:
        """`classifier` is a transformers decoder with a `score` layer, on `device`."""
        self._decoder = classifier.base_model
        self._head = classifier.score
        self._pad_id = pad_id
        self._device = device

    @torch.inference_mode()
    def scores(self, texts: Sequence[Sequence[int]], runs: Sequence[Run]) -> list[float]:
        """Return the score of each of `texts`, lists of token ids, which `runs` divide."""
        # Stems with branches come first, so that their keys and values are the first rows.
        rows = sorted(runs, key=lambda run: not run.branches)
        branching = [run for run in rows if run.branches]
        alone = rows[len(branching) :]
        cache = DynamicCache() if branching else None
        stems = [texts[run.start][: run.shared] for run in rows]
        hidden = self._decoder(
            input_ids=self._padded(stems, self._pad_id), past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        last = [(row, run.shared - 1) for row, run in enumerate(rows) if not run.branches]
        order = [run.start for run in alone]
        found = [_at(hidden, last)]
        if cache is not None:
            if alone:
                cache.batch_select_indices(torch.arange(len(branching), device=self._device))
            found.append(self._branches(texts, branching, cache, width=hidden.shape[1]))
            order += [index for run in branching for index in range(run.start, run.end)]
        logits = self._head(torch.cat(found))[:, 0].float().tolist()
        return [score for _, score in sorted(zip(order, logits, strict=True))]

    def _branches(
        self, texts: Sequence[Sequence[int]], runs: Sequence[Run], cache: DynamicCache, width: int
    ) -> torch.Tensor:
        """Return the hidden states [texts, hidden size] at the end of each branch; stems are `width` tokens wide."""
        tokens: list[list[int]] = []
        positions: list[list[int]] = []
        owners: list[list[int]] = []
        last = []
        for row, run in enumerate(runs):
            tokens.append([])
            positions.append([])
            owners.append([])
            for index in range(run.start, run.end):
                branch = texts[index][run.shared :]
                tokens[row] += branch
                positions[row] += range(run.shared, run.shared + len(branch))
                owners[row] += [index] * len(branch)
                last.append((row, len(tokens[row]) - 1))
        owner = self._padded(owners, _PADDING)
        count = owner.shape[1]
        stem_lengths = torch.tensor([run.shared for run in runs], device=self._device)
        in_stem = torch.arange(width, device=self._device) < stem_lengths[:, None, None]
        causal = torch.ones(count, count, dtype=torch.bool, device=self._device).tril()
        # Padding sees itself: a token that sees nothing would make numbers that are none.
        in_branch = (owner[:, :, None] == owner[:, None]) & causal
        seen = torch.cat([in_stem.expand(-1, count, -1), in_branch], dim=2)[:, None]
        dtype = self._decoder.dtype
        bias = torch.zeros(seen.shape, dtype=dtype, device=self._device).masked_fill_(~seen, torch.finfo(dtype).min)
        hidden = self._decoder(
            input_ids=self._padded(tokens, self._pad_id),
            attention_mask=bias,
            position_ids=self._padded(positions, 0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return _at(hidden, last)

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=self._device)


def _at(hidden: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the hidden states [places, hidden size] at (row, column) `places`."""
    index = torch.tensor(places, dtype=torch.long, device=hidden.device).reshape(-1, 2)
    return hidden[index[:, 0], index[:, 1]]
