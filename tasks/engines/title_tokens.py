"""The tokens of titles to train on: a prompt is read once for all titles that were written for it.

ART's own tokenizing reads the whole chat of each trajectory twice and looks through the vocabulary for a token that
is in none of it: nearly all of the time between a step's last verdict and its update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import art.preprocessing.tokenize
from art.preprocessing.tokenize import TokenizedResult
from art.trajectories import History, Trajectory
from openai.types.chat.chat_completion import Choice
from transformers import PreTrainedTokenizerBase

from tasks.titles.errors import ConfigError


@contextmanager
def prompts_read_once() -> Iterator[None]:
    """Let ART tokenize trajectories of one answer each, whose tokens the server has named by their ids.

    What it makes of them is the same: the prompt as the server read it, and the tokens that were sampled.
    """
    prompts: dict[tuple[tuple[str, str], ...], list[int]] = {}

    def tokenize(
        tokenizer: PreTrainedTokenizerBase,
        _image_processor: None,
        history: History,
        advantage: float,
        _without_logprobs: bool,
        trajectory: Trajectory,
        *,
        chat_template_kwargs: dict[str, Any] | None,
        **_: object,
    ) -> TokenizedResult:
        *messages, choice = cast(list[Any], history.messages_and_choices)
        asked = tuple((message["role"], message["content"]) for message in messages)
        if asked not in prompts:
            rendered = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {})
            )
            prompts[asked] = cast(list[int], rendered)
        prompt, (tokens, logprobs) = prompts[asked], _sampled(choice)
        return TokenizedResult(
            advantage=advantage,
            chat="",  # nobody reads it
            token_ids=[*prompt, *tokens],
            input_pos=list(range(len(prompt) + len(tokens))),
            assistant_mask=[0] * len(prompt) + [1] * len(tokens),
            logprobs=[math.nan] * len(prompt) + logprobs,
            pixel_values=None,
            image_grid_thw=None,
            trajectory=trajectory,
            choice_offsets=[len(prompt)],
            extra_logprobs={},
            _tokenizer=tokenizer,
        )

    module = vars(art.preprocessing.tokenize)
    of_art = module["tokenize_trajectory"]
    module["tokenize_trajectory"] = tokenize
    try:
        yield
    finally:
        module["tokenize_trajectory"] = of_art


def _sampled(choice: Choice) -> tuple[list[int], list[float]]:
    """Return the ids of an answer's tokens and their log-probabilities in nats."""
    sampled = (choice.logprobs.content if choice.logprobs else None) or []
    try:
        return [int(one.token.removeprefix("token_id:")) for one in sampled], [one.logprob for one in sampled]
    except ValueError as error:
        raise ConfigError(
            f"The policy's server must name sampled tokens by their ids, such as 'token_id:17': {error}. Start vLLM "
            "with --return-tokens-as-token-ids."
        ) from error
