"""Samples completions from a `Decoder`: many requests at once, each from its own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.decoder import Branches, Decoder
from tasks.titles.prefixes import best_runs, common_prefix


@dataclass(frozen=True)
class Generation:
    """One completion to sample. `prompt` plus `max_tokens` must fit the model's context."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: tuple[int, ...]
    temperature: float = 1.0
    """0 takes the most probable token."""
    stop: frozenset[int] = frozenset()


@dataclass
class Completion:
    """Sampled tokens, the stop token included, with log-probabilities at temperature 1 in nats."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] = "length"


@dataclass
class _Row:
    """A completion in the making."""

    request: Generation
    completion: Completion
    random: np.random.Generator
    index: int


class NotFinite(Exception):
    """The model's logits are not finite numbers."""


def generate(
    decoder: Decoder,
    requests: Sequence[Generation],
    cores: Cores,
    *,
    cancelled: Callable[[int], bool] = lambda index: False,
) -> list[Completion]:
    """Return one completion per request, in their order.

    `cancelled(index)` is asked before each token; a request for which it is true stops there.
    Raises `NotFinite` where the model is broken.
    """
    rows = [
        _Row(request, Completion(), np.random.Generator(np.random.PCG64(request.seed)), index)
        for index, request in enumerate(requests)
    ]
    by_prompt: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.request.prompt, []).append(row)
    clusters = share_prefixes({prompt: len(members) for prompt, members in by_prompt.items()})
    parts = _divide(clusters, cores.count)
    cores.map(lambda part: _sample(decoder, part, by_prompt, cancelled), parts)
    for row in rows:
        if cancelled(row.index):
            row.completion.finish_reason = "cancelled"
    return [row.completion for row in rows]


@torch.inference_mode()
def prompt_logprobs(decoder: Decoder, prompt: Sequence[int]) -> list[float]:
    """Return log p(token | tokens before it) in nats, for every token of `prompt` but the first."""
    logprobs = decoder.logits(prompt)[:-1].double().log_softmax(dim=-1)
    return logprobs.gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist()


def _divide(clusters: Sequence[Cluster], parts: int) -> list[list[Cluster]]:
    """Spread `clusters` over at most `parts` lists of about the same number of tokens."""
    divided: list[list[Cluster]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for cluster in sorted(clusters, key=lambda one: one.tokens, reverse=True):
        smallest = sizes.index(min(sizes))
        divided[smallest].append(cluster)
        sizes[smallest] += cluster.tokens
    return [part for part in divided if part]


@torch.inference_mode()
def _sample(
    decoder: Decoder,
    clusters: Sequence[Cluster],
    by_prompt: Mapping[tuple[int, ...], list[_Row]],
    cancelled: Callable[[int], bool],
) -> None:
    """Fill the completions of every row of `clusters`."""
    groups: list[tuple[Branches, list[_Row]]] = []
    first_logits = []
    for cluster in clusters:
        members = [row for prompt in cluster.prompts for row in by_prompt[prompt]]
        if all(cancelled(row.index) for row in members):
            continue
        branches, logits = _start(decoder, cluster, members)
        groups.append((branches, members))
        first_logits.append(logits)
    if groups:
        _run(decoder, groups, torch.cat(first_logits), cancelled)


def _start(decoder: Decoder, cluster: Cluster, members: list[_Row]) -> tuple[Branches, torch.Tensor]:
    """Return the branches of a cluster with their prompts read, and the logits [rows, vocabulary] after them."""
    prefix, logits = decoder.prefill(cluster.prompts[0][: cluster.shared])
    branches = Branches(prefix, len(members))
    if len(cluster.prompts) == 1:
        return branches, logits.expand(len(members), -1)
    rest = [row.request.prompt[cluster.shared :] for row in members]
    widths = torch.tensor([len(tokens) for tokens in rest])
    tokens = torch.zeros(len(rest), int(widths.max()), dtype=torch.long)
    for place, part in enumerate(rest):
        tokens[place, : len(part)] = torch.tensor(part)
    return branches, decoder.extend([branches], tokens, widths)


def _run(
    decoder: Decoder,
    groups: list[tuple[Branches, list[_Row]]],
    logits: torch.Tensor,
    cancelled: Callable[[int], bool],
) -> None:
    """Sample until every row is done; rows that are leave the batch at once."""
    while True:
        rows = [row for _, members in groups for row in members]
        tokens, logprobs = _choose(logits, rows)
        going = []
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            completion, request = row.completion, row.request
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            if token in request.stop:
                completion.finish_reason = "stop"
            going.append(
                token not in request.stop and len(completion.tokens) < request.max_tokens and not cancelled(row.index)
            )
        staying = torch.tensor(going)
        if not staying.all():
            groups = _compact(groups, staying)
            tokens = tokens[staying]
        if not groups:
            return
        logits = decoder.extend(
            [branches for branches, _ in groups], tokens[:, None], torch.ones(len(tokens), dtype=torch.long)
        )


def _compact(groups: list[tuple[Branches, list[_Row]]], staying: torch.Tensor) -> list[tuple[Branches, list[_Row]]]:
    kept = []
    for (branches, members), part in zip(groups, staying.split([len(rows) for _, rows in groups]), strict=True):
        index = part.nonzero()[:, 0]
        if len(index) == 0:
            continue
        if len(index) < len(members):
            branches.keep(index)
        kept.append((branches, [members[place] for place in index.tolist()]))
    return kept


def _choose(logits: torch.Tensor, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token per row and its log-probability at temperature 1.

    Sampling inverts the cumulative distribution in float64 at one uniform number of the row's own
    generator, so that a request's tokens depend on its seed alone.
    """
    logprobs = logits.double().log_softmax(dim=-1)
    if not bool(logprobs.isfinite().all()):
        raise NotFinite("The model's logits are not finite.")
    temperatures = torch.tensor([row.request.temperature for row in rows], dtype=torch.float64)
    greedy = temperatures == 0
    scaled = logprobs / torch.where(greedy, 1.0, temperatures)[:, None]
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    uniform = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
    # Scaled by the last entry, which rounding leaves a little off 1; `right` never lands on a probability of 0.
    sampled = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, logprobs.argmax(dim=-1), sampled.clamp(max=logits.shape[1] - 1))
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


@dataclass(frozen=True)
class Cluster:
    """Different prompts that are computed on top of one prefix of `shared` tokens."""

    prompts: tuple[tuple[int, ...], ...]
    shared: int

    @property
    def tokens(self) -> int:
        """Tokens to read, each prompt's rest counted once."""
        return self.shared + sum(len(prompt) - self.shared for prompt in self.prompts)


def share_prefixes(prompts: dict[tuple[int, ...], int]) -> list[Cluster]:
    """Group prompts (with how many completions each has) so that the fewest tokens are computed."""
    ordered = sorted(prompts)
    common = [common_prefix(left, right) for left, right in pairwise(ordered)]
    runs = best_runs([len(prompt) for prompt in ordered], common, [prompts[prompt] for prompt in ordered])
    return [Cluster(tuple(ordered[run.start : run.end]), run.shared) for run in runs]
