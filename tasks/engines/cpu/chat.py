"""Token ids of chats, the same ones that ART's tokenising gives a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from tasks.titles.errors import ConfigError


class ControlToken(ValueError):
    """A message holds text that the tokenizer reads as a control token."""


class ChatTokenizer:
    """Turns messages into a prompt and tokens into text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._control = tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content
        )
        self.stop = frozenset(end_of_turn)
        # A group's generations send the same messages within a few milliseconds.
        self._cached = lru_cache(maxsize=64)(self._prompt_ids)

    def prompt_ids(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the token ids of (role, content) messages, up to where the assistant's answer begins.

        Raises `ControlToken` for content with a control token in it: the chat template would let it
        end its message and begin another.
        """
        return self._cached(tuple(messages))

    def _prompt_ids(self, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        for number, (_, content) in enumerate(messages):
            for token in self._control:
                if token in content:
                    raise ControlToken(f"messages[{number}] contains the control token {token}; escape it first.")
        ids = self._tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return tuple(ids)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of plain text."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids` without control tokens."""
        return cast(
            str,
            self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False),
        )


def end_of_turn(generation_config: Any) -> list[int]:
    """Return the tokens that end an answer; raise `ConfigError` for a model that names none."""
    ends = generation_config.eos_token_id
    if ends is None:
        raise ConfigError("The base model's generation_config.json names no eos_token_id: an answer would never end.")
    return list(ends) if isinstance(ends, list) else [ends]
