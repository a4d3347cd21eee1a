"""The canary: asks the server and the trainer for the log-probabilities of one fixed title.

A server that goes on with old weights answers happily, and training on its titles teaches nothing;
the only symptom is an importance ratio that nobody looks at. So after every change of the adapter both
are asked about the same tokens, and the run stops when they part.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isnan
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


def canary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the fixed prompt and title, as the policy would see and write them."""
    prompt = tokenizer.apply_chat_template(
        list(policy_messages(CANARY_BODY)), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [*prompt, *tokenizer.encode(CANARY_TITLE, add_special_tokens=False)]


async def check_canary(
    client: AsyncOpenAI,
    model_name: str,
    token_ids: Sequence[int],
    trainer_logprobs: Sequence[float],
    tolerance: float,
) -> float:
    """Return the largest difference, in nats, between the server's and the trainer's log-probabilities.

    `trainer_logprobs` holds log p(token | tokens before it) of every token but the first. Raises
    `SamplerDisagrees` when one differs by more than `tolerance`, or when the server's answer does not
    cover the tokens.
    """
    answer = await client.completions.create(
        model=model_name, prompt=list(token_ids), echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs if answer.choices else None
    served = (logprobs.token_logprobs or [])[1 : len(token_ids)] if logprobs is not None else []
    if len(served) != len(token_ids) - 1 or len(served) != len(trainer_logprobs) or None in served:
        raise SamplerDisagrees(
            f"The canary got {len(served)} log-probabilities from the server for {model_name} and "
            f"{len(trainer_logprobs)} from the trainer; {len(token_ids) - 1} were expected of each."
        )
    differences = [abs(one - other) for one, other in zip(served, trainer_logprobs, strict=True)]
    # A broken model answers NaN, which no comparison finds too large by itself.
    differences = [inf if isnan(difference) else difference for difference in differences]
    worst = max(range(len(differences)), key=differences.__getitem__)
    if differences[worst] > tolerance:
        raise SamplerDisagrees(
            f"Server and trainer hold different weights for {model_name}: token {worst + 1} of the canary has "
            f"log-probability {served[worst]:.4f} on the server and {trainer_logprobs[worst]:.4f} in the trainer, "
            f"{differences[worst]:.4f} nats apart; at most {tolerance} are allowed. The run stops because it would "
            "train on titles of another model. Resume from the last checkpoint."
        )
    return differences[worst]
