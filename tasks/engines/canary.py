"""The canary: asks the sampler and the trainer for the log-probabilities of one title.

A sampler that goes on with old weights answers happily, and training on its titles teaches nothing;
the only symptom is an importance ratio that nobody looks at. So after every change of the adapter both
are asked about the same tokens, and the run stops when they part.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isnan, nan
from typing import TYPE_CHECKING

from tasks.titles.errors import SamplerDisagrees
from tasks.titles.prompts import policy_messages

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from transformers import PreTrainedTokenizerBase

CANARY_BODY = (
    "Corvane Labs has released version 2.4 of Tidewater, its open-source message queue. The new version needs "
    "38 percent less memory than the last one, and a cluster of three machines restarts in under nine seconds. "
    "It runs on Linux and macOS; packages for Windows are planned for March."
)
CANARY_TITLE = "Tidewater 2.4: an open-source message queue that needs 38 percent less memory"


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
    trainer_logprobs: Sequence[float],
    tolerance: float,
) -> float:
    """Return the largest difference, in nats, between the server's and the trainer's log-probabilities.

    `trainer_logprobs` holds log p(token | tokens before it) of every token but the first. Raises
    `SamplerDisagrees` as `largest_difference` does.
    """
    answer = await client.completions.create(
        model=model_name, prompt=list(token_ids), echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs if answer.choices else None
    served = (logprobs.token_logprobs or [])[1 : len(token_ids)] if logprobs is not None else []
    return largest_difference(
        served, trainer_logprobs, tokens=len(token_ids) - 1, sampler=f"the server of {model_name}", tolerance=tolerance
    )


def largest_difference(
    sampled: Sequence[float | None],
    trained: Sequence[float],
    *,
    tokens: int,
    sampler: str,
    tolerance: float,
) -> float:
    """Return the largest difference, in nats, between two parties' log-probabilities of the same `tokens` tokens.

    `sampled` are those of `sampler` (its name, for the message), `trained` those of the trainer. Raises
    `SamplerDisagrees` when one differs by more than `tolerance`, or when one of them does not cover the tokens.
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
    worst = max(range(tokens), key=differences.__getitem__)
    if differences[worst] > tolerance:
        raise SamplerDisagrees(
            f"Trainer and sampler hold different weights: token {worst + 1} of the canary has log-probability "
            f"{served[worst]:.4f} for {sampler} and {trained[worst]:.4f} in the trainer, "
            f"{differences[worst]:.4f} nats apart; at most {tolerance} are allowed. The run stops because it would "
            "train on titles of another model. Resume from the last checkpoint."
        )
    return differences[worst]
