"""What a reward model reads, as text and as tokens; what is too long loses the end of the body, never of the title.

The server, its clients and the training of reward models share this, so that a model is trained on what it is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from reward_server.errors import BadInput
from reward_server.schemas import ScoreRequest
from tasks.titles.errors import ConfigError
from tasks.titles.prompts import reward_model_text

_BODY_START, _BODY_END = "<body>", "</body>\n<title>"


def text_of(request: ScoreRequest) -> str:
    """Return what the model reads for `request`, uncut."""
    return reward_model_text(
        title=request.title,
        by=request.by or "",
        time=request.time,
        scraped_body=request.scraped_body,
        url=request.url or "",
    )


def readable_length(limit: int, tokenizer: Any, config: Any) -> int:
    """Return `limit` in tokens, or what tokenizer and model can read where that is less."""
    limits = (limit, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    return min(length for length in limits if length)


def padding_id(tokenizer: Any, config: Any) -> int:
    """Return the token that fills batches up. Decoder classifiers read their score at the last other token.

    Raises `ConfigError` where there is none.
    """
    for candidate in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    raise ConfigError("Neither the reward model nor its tokenizer names a padding or an end token.")


def tokenize(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    """Return what `tokenizer` makes of `texts`; special tokens that an article spells out are plain characters."""
    return tokenizer(texts, split_special_tokens=True, **options)


def fast_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Return a function that gives the token ids of texts as `tokenize` does, in about half the time.

    It leaves out what nobody here reads: masks, offsets and their conversion.
    """
    encoder = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return lambda texts: [encoding.ids for encoding in encoder.encode_batch_fast(texts)]


def cut_body(tokenizer: Any, text: str, max_length: int) -> list[int]:
    """Return at most `max_length` token ids of a reward model's `text`, cut at the end of its body.

    Raises `BadInput` where title, URL and submitter alone are too long.
    """
    start = text.index(_BODY_START) + len(_BODY_START)
    end = text.rindex(_BODY_END)
    encoded = tokenize(tokenizer, [text], return_offsets_mapping=True)
    body_tokens = [left for left, right in encoded["offset_mapping"][0] if start <= left < end and right > left]
    # The pieces may split into other tokens once they are joined: drop as many more as are still too many.
    keep = len(body_tokens) - (len(encoded["input_ids"][0]) - max_length)
    while keep >= 0:
        shorter = text[: body_tokens[keep]] + text[end:]
        ids = tokenize(tokenizer, [shorter])["input_ids"][0]
        if len(ids) <= max_length:
            return ids
        keep -= len(ids) - max_length
    raise BadInput(
        f"Title, URL and submitter alone are longer than the {max_length} tokens that the reward model reads."
    )
