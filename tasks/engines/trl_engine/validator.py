"""The validator inside the trainer's process: the policy's own base model, its adapter switched off."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.titles.errors import ConfigError, UnreadableVerdict
from tasks.titles.prefixes import common_prefix
from tasks.titles.prompts import validator_messages
from tasks.titles.story import Story

HIDDEN_STATES = "UNSLOTH_RETURN_HIDDEN_STATES"
_SHARED, _PADDING = -1, -2


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the body supports the title, with the probabilities of the two words as the answer's first token."""

    supported: bool
    true: float
    false: float

    @property
    def neither(self) -> float:
        """The share of probability on any other first token."""
        return 1.0 - self.true - self.false


class LocalValidator:
    """Judges titles by one forward pass over many chats, from the first token of the answer.

    A validator that is asked over HTTP writes its answer out; its first token at temperature 0 is the one that is
    most probable here. Chats about one body stand behind one copy of it in a row, each of them as if alone, where the
    model lets a mask say which tokens read which.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokens_per_pass: int = 65_536,
    ) -> None:
        """`tokens_per_pass` bounds rows times longest row of a pass, and so its memory; one row always fits.

        Raises `ConfigError` where the tokenizer's first tokens of True and False are the same.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._tokens_per_pass = tokens_per_pass
        self._true, self._false = verdict_tokens(tokenizer)
        self._takes_masks = _takes_masks(model)

    def judge(self, pairs: Sequence[tuple[Story, str]]) -> list[Verdict | UnreadableVerdict]:
        """Return the verdict on each (story, title), in order; the model is left as it was.

        Where another token than True's or False's is the most probable one, or the logits are not finite, there
        is an `UnreadableVerdict` in the verdict's place.
        """
        chats = [validator_messages(story.scraped_body, title) for story, title in pairs]
        rows = self._rows(self._token_ids(chats), [story.scraped_body for story, _ in pairs])
        outcomes: dict[int, Verdict | UnreadableVerdict] = {}
        with _as_base_model(self._model):
            for batch in _batches([len(row.tokens) for row in rows], self._tokens_per_pass):
                together = [rows[number] for number in batch]
                judged = [chat for row in together for chat in row.chats]
                outcomes.update(zip(judged, map(self._read, self._last_logits(together)), strict=True))
        return [outcomes[index] for index in range(len(pairs))]

    def _rows(self, chats: Sequence[Sequence[int]], bodies: Sequence[str]) -> list[_Row]:
        """Put chats about one body into one row, as long as that is no more than twice as long as what they share."""
        alike: dict[str | int, list[int]] = {}
        for index, body in enumerate(bodies):
            alike.setdefault(body if self._takes_masks else index, []).append(index)
        rows = []
        for indices in alike.values():
            first = chats[indices[0]]
            # Each keeps a token of its own: what follows it is read there.
            shared = min(common_prefix(first, chats[index][:-1]) for index in indices)
            row = _Row(first[:shared])
            rows.append(row)
            for index in indices:
                if row.chats and len(row.tokens) + len(chats[index]) - shared > 2 * shared:
                    row = _Row(first[:shared])
                    rows.append(row)
                row.add(index, chats[index])
        return rows

    def _token_ids(self, chats: Sequence[Sequence[dict[str, str]]]) -> list[list[int]]:
        if not chats:
            return []
        encoded: Any = self._tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            add_generation_prompt=True,
            return_dict=False,  # Unsloth changes the default
            tokenizer_kwargs={"verbose": False},
        )
        return list(encoded)

    def _last_logits(self, rows: Sequence[_Row]) -> torch.Tensor:
        """Return float32 logits (chats by vocabulary, on the CPU) of the token that follows each chat of the rows."""
        # Padded on the left, so that the last tokens of a row's chats stand in the last columns.
        longest, most = max(len(row.tokens) for row in rows), max(len(row.chats) for row in rows)
        columns = [[_Token(0, 0, _PADDING)] * (longest - len(row.tokens)) + row.in_order() for row in rows]
        tokens, positions, owners = torch.tensor(columns).to(self._model.device).unbind(-1)
        answer: Any = self._model(
            input_ids=tokens,
            # A mask of rows by columns means that each token reads all that are there before it.
            attention_mask=(owners != _PADDING).long() if most == 1 else _reads(owners),
            position_ids=positions,
            logits_to_keep=most,
            use_cache=False,
        )
        last = zip(rows, answer.logits, strict=True)
        return torch.cat([logits[most - len(row.chats) :] for row, logits in last]).float().cpu()

    def _read(self, logits: torch.Tensor) -> Verdict | UnreadableVerdict:
        if not logits.isfinite().all():
            return _unreadable("its logits are not finite: look at the base model's weights and number format", None)
        probabilities = logits.softmax(-1)
        true, false = probabilities[self._true].item(), probabilities[self._false].item()
        likeliest = int(logits.argmax())
        if likeliest not in (self._true, self._false):
            return _unreadable(
                f"its answer would begin with {self._tokenizer.decode([likeliest])!r}: if this is common, the base "
                "model is too weak a validator or its chat template is wrong",
                1.0 - true - false,
            )
        return Verdict(likeliest == self._true, true, false)


class _Token(NamedTuple):
    id: int
    position: int
    owner: int
    """The number of its chat in the row, `_SHARED` or `_PADDING`."""


class _Row:
    """Chats behind one copy of the tokens that they begin with."""

    def __init__(self, shared: Sequence[int]) -> None:
        self.chats: list[int] = []
        """Their indices."""
        self.tokens = [_Token(token, position, _SHARED) for position, token in enumerate(shared)]
        self._shared = len(shared)
        self._ends: list[int] = []

    def add(self, index: int, chat: Sequence[int]) -> None:
        """Put the rest of a chat, one token at least, behind the others."""
        owner, rest = len(self.chats), range(self._shared, len(chat))
        self.chats.append(index)
        self.tokens += [_Token(chat[position], position, owner) for position in rest]
        self._ends.append(len(self.tokens) - 1)

    def in_order(self) -> list[_Token]:
        """Return the tokens with each chat's last one at the end: the model is asked for the logits of these alone."""
        ends = set(self._ends)
        return [token for place, token in enumerate(self.tokens) if place not in ends] + [
            self.tokens[place] for place in self._ends
        ]


def _reads(owners: torch.Tensor) -> torch.Tensor:
    """Return whether each token (dimension 2) reads each (3), in rows (0), for the owners of their columns."""
    # Those before it of its own chat and of what all share. Padding, of which there is nothing to read but padding,
    # stays a number.
    reads = owners[:, :, None] == owners[:, None, :]
    reads |= (owners == _SHARED)[:, None, :]
    return reads.tril_()[:, None]


def verdict_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the first token of True and of False as they stand behind the generation prompt.

    Raises `ConfigError` where the two are the same, or where the word melts into the prompt's last token.
    """
    chat = [dict(message) for message in validator_messages("body", "title")]
    prompt = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    before = tokenizer.encode(prompt, add_special_tokens=False)
    true, false = (tokenizer.encode(prompt + word, add_special_tokens=False) for word in ("True", "False"))
    apart = all(ids[: len(before)] == before and len(ids) > len(before) for ids in (true, false))
    if not apart or true[len(before)] == false[len(before)]:
        raise ConfigError(
            f"The tokenizer '{tokenizer.name_or_path}' cannot tell a validator's answers apart by their first token: "
            f"behind the generation prompt, True is {true[len(before) :]} and False is {false[len(before) :]}. "
            "Choose a base model whose tokenizer can."
        )
    return true[len(before)], false[len(before)]


def _takes_masks(model: PeftModel | PreTrainedModel) -> bool:
    """Return whether a mask of ours decides alone which tokens a token of `model` reads."""
    config: Any = model.config
    attends_to_all = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    # Unsloth's classes assume that each token reads all before it.
    return attends_to_all and config._attn_implementation == "sdpa" and "unsloth" not in sys.modules


def _unreadable(reason: str, neither: float | None) -> UnreadableVerdict:
    error = UnreadableVerdict(f"The validator must answer True or False, but {reason}. The trajectory is dropped.")
    error.service = "validator"
    error.neither = neither
    return error


def _batches(lengths: Sequence[int], tokens_per_pass: int) -> Iterator[list[int]]:
    """Yield the rows' indices in batches of similar lengths, each within `tokens_per_pass` once padded."""
    batch: list[int] = []
    # From the longest on, a batch's first row is what the others are padded to.
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_pass:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextmanager
def plain_logits() -> Iterator[None]:
    """Have a model of Unsloth's return logits; its trainer asks for hidden states in their place by this variable."""
    asked = os.environ.get(HIDDEN_STATES)
    os.environ[HIDDEN_STATES] = "0"
    try:
        yield
    finally:
        if asked is None:
            del os.environ[HIDDEN_STATES]
        else:
            os.environ[HIDDEN_STATES] = asked


@contextmanager
def _as_base_model(model: PeftModel | PreTrainedModel) -> Iterator[None]:
    """Compute with the base weights, without dropout and gradients; put everything back afterwards.

    TRL reads `model.training` to tell training from evaluation, and PEFT makes a switched-on adapter trainable
    whether it was or not.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        with (
            torch.no_grad(),
            plain_logits(),
            model.disable_adapter() if isinstance(model, PeftModel) else nullcontext(),
        ):
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)
