"""The forward passes of a decoder classifier; what texts have in common at their beginning is computed once.

The first pass reads the stems, a row each: a prefix that several texts share, or a whole text that shares nothing. They
are padded on the right and need no mask: a token sees only those before it, never the padding behind. The second pass
reads the rests of the texts (branches) on top of the stems' keys and values. All branches of a stem lie side by side in
its row, so that the keys and values are not copied; a mask shows each branch its stem and itself, and its positions go
on where the stem ends. Short stems and their branches are read in one pass, where the mask is for all of a row. A
text's score is read at its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reward_server.graphs import Graphs
from tasks.titles.prefixes import Run

_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_PADDING = -1
_ONE_PASS_TOKENS = 640
"""Longest stems that are read in one pass with their branches, with a dense mask. On two cores that made 48 titles 8%
faster with bodies of 200 tokens, 4% with 600, and 3% slower with 900."""
_ATTENTION = "sdpa_with_the_given_mask"
"""PyTorch's attention without transformers' making of masks: none is a causal one, which the fastest kernels know."""

AttentionInterface.register(_ATTENTION, sdpa_attention_forward)


class Inputs(NamedTuple):
    """The integers that both passes read; those of the second have no rows where nothing branches."""

    stems: torch.Tensor
    """Token ids [rows, stem tokens]; rows with branches come first."""
    alone: torch.Tensor
    """Row and column [texts that share nothing, 2] of their last tokens."""
    branches: torch.Tensor
    """Token ids [branching rows, branch tokens]."""
    positions: torch.Tensor
    """Their places [branching rows, branch tokens] in their texts."""
    owners: torch.Tensor
    """To which text each belongs [branching rows, branch tokens], `_PADDING` where to none."""
    stem_lengths: torch.Tensor
    """Tokens of each stem [branching rows] without its padding."""
    ends: torch.Tensor
    """Row and column [texts that share, 2] of the last token of each branch."""

    def to(self, device: str) -> Inputs:
        """Return them on `device`."""
        return Inputs(*(tensor.to(device, non_blocking=True) for tensor in self))


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
        """`classifier` is a transformers decoder with a `score` layer, on `device`; `undo` undoes what is changed."""
        self._classifier = classifier
        self._attention = classifier.config._attn_implementation
        classifier.set_attn_implementation(_ATTENTION)
        self._norms = [module for module in classifier.modules() if hasattr(module, "variance_epsilon")]
        for norm in self._norms:
            norm.forward = partial(_rms_norm, norm)
        self._decoder = classifier.base_model
        self._head = classifier.score
        self._pad_id = pad_id
        self._device = device
        self._graphs = Graphs(self._logits, pad_id, _PADDING) if device == "cuda" else None

    def undo(self) -> None:
        """Give the classifier its own attention and norms back."""
        self._classifier.set_attn_implementation(self._attention)
        for norm in self._norms:
            del norm.forward

    @torch.inference_mode()
    def scores(self, texts: Sequence[Sequence[int]], runs: Sequence[Run]) -> list[float]:
        """Return the score of each of `texts`, lists of token ids, which `runs` divide."""
        # Stems with branches come first, so that their keys and values are the first rows.
        rows = sorted(runs, key=lambda run: not run.branches)
        inputs = self._inputs(texts, rows)
        logits = None if self._graphs is None else self._graphs.logits(inputs)
        if logits is None:
            logits = self._logits(inputs.to(self._device))
        order = [run.start for run in rows if not run.branches]
        order += [index for run in rows if run.branches for index in range(run.start, run.end)]
        return [score for _, score in sorted(zip(order, logits.tolist(), strict=True))]

    def _inputs(self, texts: Sequence[Sequence[int]], rows: Sequence[Run]) -> Inputs:
        tokens: list[list[int]] = []
        positions: list[list[int]] = []
        owners: list[list[int]] = []
        ends = []
        branching = [run for run in rows if run.branches]
        for row, run in enumerate(branching):
            tokens.append([])
            positions.append([])
            owners.append([])
            for index in range(run.start, run.end):
                branch = texts[index][run.shared :]
                tokens[row] += branch
                positions[row] += range(run.shared, run.shared + len(branch))
                owners[row] += [index] * len(branch)
                ends.append((row, len(tokens[row]) - 1))
        alone = [(row, run.shared - 1) for row, run in enumerate(rows) if not run.branches]
        return Inputs(
            stems=_padded([texts[run.start][: run.shared] for run in rows], self._pad_id),
            alone=torch.tensor(alone, dtype=torch.long).reshape(-1, 2),
            branches=_padded(tokens, self._pad_id),
            positions=_padded(positions, 0),
            owners=_padded(owners, _PADDING),
            stem_lengths=torch.tensor([run.shared for run in branching], dtype=torch.long),
            ends=torch.tensor(ends, dtype=torch.long).reshape(-1, 2),
        )

    def _logits(self, inputs: Inputs) -> torch.Tensor:
        """Return the scores [texts]: of those that share nothing, then of the others."""
        if len(inputs.branches) == len(inputs.stems) and inputs.stems.shape[1] <= _ONE_PASS_TOKENS:
            return self._logits_at_once(inputs)
        branching = len(inputs.branches)
        cache = DynamicCache() if branching else None
        hidden = self._decoder(
            input_ids=inputs.stems, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        found = [hidden[inputs.alone[:, 0], inputs.alone[:, 1]]]
        if cache is not None:
            if branching < len(inputs.stems):
                cache.batch_select_indices(torch.arange(branching, device=hidden.device))
            hidden = self._decoder(
                input_ids=inputs.branches,
                attention_mask=self._mask(inputs),
                position_ids=inputs.positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            found.append(hidden[inputs.ends[:, 0], inputs.ends[:, 1]])
        return self._head(torch.cat(found))[:, 0].float()

    def _logits_at_once(self, inputs: Inputs) -> torch.Tensor:
        """Return the scores [texts] as `_logits` does, from one pass over stems and branches, a row of each.

        Rows that a graph's shape adds have both, so texts that share nothing may be among them.
        """
        rows, width = inputs.stems.shape
        in_stem = torch.arange(width, device=inputs.stems.device)
        hidden = self._decoder(
            input_ids=torch.cat([inputs.stems, inputs.branches], dim=1),
            position_ids=torch.cat([in_stem.expand(rows, -1), inputs.positions], dim=1),
            attention_mask=torch.cat([self._stem_mask(inputs), self._mask(inputs)], dim=2),
            use_cache=False,
        ).last_hidden_state
        columns = torch.cat([inputs.alone[:, 1], width + inputs.ends[:, 1]])
        return self._head(hidden[torch.cat([inputs.alone[:, 0], inputs.ends[:, 0]]), columns])[:, 0].float()

    def _stem_mask(self, inputs: Inputs) -> torch.Tensor:
        """Return what is added to the attention of stems [rows, 1, stem tokens, all tokens] where branches follow."""
        rows, width = inputs.stems.shape
        dtype, device = self._decoder.dtype, inputs.stems.device
        mask = torch.full((width, width + inputs.owners.shape[1]), torch.finfo(dtype).min, dtype=dtype, device=device)
        return mask.triu_(1).expand(rows, 1, -1, -1)

    def _mask(self, inputs: Inputs) -> torch.Tensor:
        """Return what is added to the attention of branches [branching rows, 1, branch tokens, all tokens]."""
        width, count, device = inputs.stems.shape[1], inputs.owners.shape[1], inputs.owners.device
        in_stem = torch.arange(width, device=device) < inputs.stem_lengths[:, None, None]
        causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        # Padding sees itself: a token that sees nothing would make numbers that are none.
        in_branch = (inputs.owners[:, :, None] == inputs.owners[:, None]) & causal
        seen = torch.cat([in_stem.expand(-1, count, -1), in_branch], dim=2)[:, None]
        dtype = self._decoder.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


def _rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Compute transformers' root mean square norm by PyTorch's one kernel instead of eight."""
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return `rows` as one tensor, filled up with `value` on the right."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long).reshape(
        len(rows), longest
    )
