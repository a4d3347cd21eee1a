"""The validator inside the trainer's process: the policy's own base model, its adapter switched off."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.titles.errors import ConfigError, UnreadableVerdict
from tasks.titles.prompts import validator_messages
from tasks.titles.story import Story

HIDDEN_STATES = "UNSLOTH_RETURN_HIDDEN_STATES"


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
    most probable here.
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

    def judge(self, pairs: Sequence[tuple[Story, str]]) -> list[Verdict | UnreadableVerdict]:
        """Return the verdict on each (story, title), in order; the model is left as it was.

        Where another token than True's or False's is the most probable one, or the logits are not finite, there
        is an `UnreadableVerdict` in the verdict's place.
        """
        chats = [validator_messages(story.scraped_body, title) for story, title in pairs]
        rows = self._token_ids(chats)
        outcomes: dict[int, Verdict | UnreadableVerdict] = {}
        with _as_base_model(self._model):
            for batch in _batches([len(row) for row in rows], self._tokens_per_pass):
                logits = self._last_logits([rows[index] for index in batch])
                outcomes.update(zip(batch, map(self._read, logits), strict=True))
        return [outcomes[index] for index in range(len(rows))]

    def _token_ids(self, chats: Sequence[Sequence[dict[str, str]]]) -> list[list[int]]:
        if not chats:
            return []
        encoded: Any = self._tokenizer.apply_chat_template(
            [list(chat) for chat in chats], add_generation_prompt=True, tokenizer_kwargs={"verbose": False}
        )
        return list(encoded["input_ids"])

    def _last_logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return float32 logits (rows by vocabulary, on the CPU) of the token that follows each row."""
        # Padded on the left, so that every row's last token stands in the last column. What stands in the padding
        # is masked; positions count from each row's own first token.
        longest = max(len(row) for row in rows)
        padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        device = self._model.device
        answer: Any = self._model(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            logits_to_keep=1,
            use_cache=False,
        )
        return answer.logits[:, -1].float().cpu()

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
