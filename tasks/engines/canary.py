"""The canary: asks the sampler and the trainer for the log-probabilities of one title.

A sampler that goes on with old weights answers happily, and training on its titles teaches nothing;
the only symptom is an importance ratio that nobody looks at. So after every change of the adapter both
are asked about the same tokens, and the run stops in two cases:

* They differ too much on average: another model, precision or mask. A single token says little: in bfloat16
  an unlikely one can be half a nat apart where the average is 0.02.
* The sampler is nearer to the trainer's values from before its updates than to those after them. One update moves
  the average hardly more than rounding does; which of the two is nearer, token by token, tells it all the same.
  Updates that rounding hides are added up until they can be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan, nan, sqrt
from statistics import fmean
from typing import TYPE_CHECKING

from tasks.titles import metric_names as names
from tasks.titles.errors import SamplerDisagrees
from tasks.titles.prompts import policy_messages

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from transformers import PreTrainedTokenizerBase

# The more tokens, the smaller the update that can be told from rounding. The server's context must hold them.
CANARY_BODY = (
    "Corvane Labs has released version 2.4 of Tidewater, its open-source message queue. The new version needs "
    "38 percent less memory than the last one, and a cluster of three machines restarts in under nine seconds. "
    "It runs on Linux and macOS; packages for Windows are planned for March.\n\n"
    "Most of the memory went into an index that was kept for every reader. It is now shared, and what a reader has "
    "seen is a single number. Readers that fall behind by more than a day are told so, where they used to slow "
    "everybody else down. The file format has not changed, so going back to version 2.3 is possible at any time.\n\n"
    "Two engineers worked on it for seven months. They first tried to compress the old index, which saved memory "
    "but made every restart slower. A student's question on the mailing list led to the simpler design."
)
CANARY_TITLE = "Tidewater 2.4: an open-source message queue that needs 38 percent less memory"
STANDARD_ERRORS = 5
"""How far below one half `nearer_to_the_new` must be to stop the run.

Where rounding alone decides, that happens in less than four of a million checks, whatever the roundings' distribution
(Hoeffding's inequality). Fewer than 33 tokens never suffice."""
LEAST_MOVED = 0.5
"""How far the trainer must have moved, as a share of its distance from the sampler, before anything is concluded.

Rounding is not all chance: a server that is a little too sure of every token, and an update that makes every token a
little less likely, would look like a server that stays behind. A bias of the rounding cannot do that to a move of its
own size."""
LEAST_MOVED_NATS = 1e-4
"""How far it must have moved on average in any case, in nats.

A sampler that computes as the trainer does has its values to the last bit, whatever rounding did to both: its distance
then says nothing of it. And an adapter merged into float32 weights does not change by an update so small that the
trainer, which keeps the two apart, only rounds differently because of it (by 1e-6 nats, with the starter model).
Titles of weights that are nearer than this are as good as the new ones'."""


@dataclass(frozen=True)
class CanaryCheck:
    """What the canary found where it let the run go on."""

    mean_difference: float
    """Between the sampler's and the trainer's log-probabilities, over the tokens, in nats."""
    max_difference: float
    """The largest of one token, in nats."""
    followed: float | None = None
    """`nearer_to_the_new`; None where the trainer's values from before are not known, or have not moved enough."""

    def metrics(self) -> dict[str, float]:
        """Return the findings by the metrics' names."""
        found = {names.CANARY_MEAN_DIFFERENCE: self.mean_difference, names.CANARY_MAX_DIFFERENCE: self.max_difference}
        return found if self.followed is None else found | {names.CANARY_FOLLOWED: self.followed}


def canary_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the fixed prompt, as the policy would see it."""
    ids = tokenizer.apply_chat_template(
        list(policy_messages(CANARY_BODY)), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(ids)


def canary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the fixed prompt and title, as the policy would see and write them."""
    return [*canary_prompt(tokenizer), *tokenizer.encode(CANARY_TITLE, add_special_tokens=False)]


async def check_canary(
    client: AsyncOpenAI,
    model_name: str,
    token_ids: Sequence[int],
    trained: Sequence[float],
    *,
    before: Sequence[float] | None = None,
    tolerance: float,
) -> CanaryCheck:
    """Ask the server about the same tokens as the trainer, and return what the two answers make.

    `trained` holds the trainer's log p(token | tokens before it) of every token but the first, `before` what they
    were at the last check that could tell, where there was one. Raises `SamplerDisagrees` as `compare` does.
    """
    answer = await client.completions.create(
        model=model_name, prompt=list(token_ids), echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs if answer.choices else None
    served = (logprobs.token_logprobs or [])[1 : len(token_ids)] if logprobs is not None else []
    sampler = f"the server of {model_name}"
    return compare(served, trained, before=before, tokens=len(token_ids) - 1, sampler=sampler, tolerance=tolerance)


def compare(
    sampled: Sequence[float | None],
    trained: Sequence[float],
    *,
    before: Sequence[float] | None = None,
    tokens: int,
    sampler: str,
    tolerance: float,
) -> CanaryCheck:
    """Compare two parties' log-probabilities, in nats, of the same `tokens` tokens.

    `sampled` are those of `sampler` (its name, for the message), `trained` those of the trainer, `before` the
    trainer's from before its last updates. Raises `SamplerDisagrees` when the mean difference is above `tolerance`,
    when one of the two does not cover the tokens, and when the sampler holds the weights from before the updates.
    """
    if tokens < 1 or len(sampled) != tokens or len(trained) != tokens:
        raise SamplerDisagrees(
            f"The canary got {len(sampled)} log-probabilities from {sampler} and {len(trained)} from the trainer; "
            f"{tokens} were expected of each, and at least one."
        )
    # A broken model answers NaN, which no comparison finds too large by itself, or nothing in its place.
    served = [nan if one is None else one for one in sampled]
    differences = [abs(one - other) for one, other in zip(served, trained, strict=True)]
    differences = [inf if isnan(difference) else difference for difference in differences]
    mean, worst = fmean(differences), max(range(tokens), key=differences.__getitem__)
    if mean > tolerance:
        raise SamplerDisagrees(
            f"Trainer and sampler hold different weights: over the canary's {tokens} tokens their log-probabilities "
            f"are {mean:.4f} nats apart on average; at most {tolerance} are allowed. Token {worst + 1} is the "
            f"farthest: {served[worst]:.4f} for {sampler} and {trained[worst]:.4f} in the trainer. The run stops "
            "because it would train on titles of another model. Resume from the last checkpoint."
        )
    followed = None if before is None else _followed(served, before, trained, sampler)
    return CanaryCheck(mean, differences[worst], followed)


def _followed(served: Sequence[float], before: Sequence[float], after: Sequence[float], sampler: str) -> float | None:
    moved, old, new = (_apart(*two) for two in ((before, after), (served, before), (served, after)))
    found = nearer_to_the_new(served, before, after)
    # The smaller distance is rounding alone, whichever weights the server holds.
    if found is None or moved < max(LEAST_MOVED * min(old, new), LEAST_MOVED_NATS):
        return None
    followed, standard_error = found
    if followed < 0.5 - STANDARD_ERRORS * standard_error:
        raise SamplerDisagrees(
            f"{sampler[0].upper()}{sampler[1:]} has not followed the trainer: of the canary's tokens, "
            f"weighed by rank, a share of {followed:.2f} is nearer to the trainer's log-probabilities after its "
            f"last updates than to those before them; where it has, that is 0.5 or more (standard error "
            f"{standard_error:.3f}). The run stops because it would train on titles of an old adapter. Resume from "
            "the last checkpoint."
        )
    return followed


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def nearer_to_the_new(
    served: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> tuple[float, float] | None:
    """Return the share of tokens that the server has nearer to `after` than to `before`, and its standard error.

    1: the server holds the trainer's new weights, 0: the old ones, one half: it cannot be told. It is Wilcoxon's
    signed-rank statistic over its largest value. A token's gain is what its squared distance loses from `before` to
    `after`; the k tokens that gain or lose anything weigh by the rank, 1 to k, of how much, so that a few that
    rounding throws far off count little more than others. If the weights have not moved, rounding alone tells
    `before` from `after`: each sign is a fair coin, the mean 1/2 and the variance sum(rank^2) / (2 sum(rank))^2 =
    (2k + 1) / 6k(k + 1). Whatever has moved makes it larger for a server that follows and smaller for one that does
    not. None where no token tells.
    """
    gains = [(one - old) ** 2 - (one - new) ** 2 for one, old, new in zip(served, before, after, strict=True)]
    ranked = sorted((gain for gain in gains if gain), key=abs)
    k = len(ranked)
    if not k:
        return None
    nearer = sum(rank for rank, gain in enumerate(ranked, 1) if gain > 0)
    return nearer / (k * (k + 1) / 2), sqrt((2 * k + 1) / (6 * k * (k + 1)))
