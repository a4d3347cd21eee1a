"""What the starter base model learns from: tales told as chats, many answers to one prompt in a row.

A row holds one prompt and several independent answers to it. Each answer sees the prompt and itself,
never its neighbours (`group` numbers the prompt 0 and the answers from 1), so one body is read once for
all of them. Three kinds of row take turns: writing titles, judging titles, and the reward model's text.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.starter import world
from tasks.titles.prompts import policy_messages, reward_model_text, validator_messages

ROW_LENGTH = 512
"""Tokens in a row; an answer that no longer fits is left out."""
TITLES_PER_ROW = 12
VERDICTS_PER_ROW = 12
NOT_LEARNED, BODY, TITLE, ANSWER = 0, 1, 2, 3
"""What the token at a place is, which decides how much its prediction weighs."""


class Rows(NamedTuple):
    """A batch of rows, each array of shape (rows, ROW_LENGTH)."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    groups: NDArray[np.int64]
    """0 for the prompt, 1 and up for the answers, -1 for padding."""
    roles: NDArray[np.int64]
    """The role of each token as something to be predicted."""


class Lessons:
    """Makes batches of rows; the same seed and index give the same batch."""

    def __init__(self, tokenizer: Any, seed: int, rows: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._rows = rows

    def __getitem__(self, index: int) -> Rows:
        """Return batch `index`."""
        rows = [self._row(index * self._rows + place) for place in range(self._rows)]
        return Rows(*(np.stack(parts) for parts in zip(*rows, strict=True)))

    def _row(self, number: int) -> tuple[NDArray[np.int64], ...]:
        rng = random.Random(f"lesson-{self._seed}-{number}")
        tale = world.tell(rng)
        choice = number % 10
        if choice < 4:
            prompt, answers = self._writing(rng, tale)
        elif choice < 9:
            prompt, answers = self._judging(rng, tale)
        else:
            prompt, answers = self._reading(rng, tale)
        return _pack(prompt, answers)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def chat(self, messages: tuple[dict[str, str], ...]) -> str:
        """Return the chat as text, ready for the assistant's answer."""
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def _writing(self, rng: random.Random, tale: world.Tale) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        prompt = self._encode(self.chat(policy_messages(tale.body)))
        end = self._encode("<|im_end|>")
        answers = []
        for _ in range(TITLES_PER_ROW):
            title = self._encode(world.human_title(rng, tale)[1]) + end
            answers.append(([prompt[-1], *title], [NOT_LEARNED] + [TITLE] * len(title)))
        return prompt[:-1], answers

    def _judging(self, rng: random.Random, tale: world.Tale) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        # The tokenizer starts a new piece at the tag's last bracket, so the prompt can be cut there.
        before, after = self.chat(validator_messages(tale.body, "\0")).split(">\0")
        prompt = self._encode(before)
        titles = world.supported_titles(tale)
        answers = []
        for place in range(VERDICTS_PER_ROW):
            if place % 2:
                title = world.unsupported_title(rng, tale)[1]
            else:
                title = rng.choice(titles[rng.choice(sorted(titles))])
            question = self._encode(f">{title}{after}")
            verdict = self._encode("False<|im_end|>" if place % 2 else "True<|im_end|>")
            answers.append((question + verdict, [NOT_LEARNED] * len(question) + [ANSWER] * len(verdict)))
        rng.shuffle(answers)
        return prompt, answers

    def _reading(self, rng: random.Random, tale: world.Tale) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        text = reward_model_text(
            title=world.human_title(rng, tale)[1],
            by=world.person(rng).replace(" ", "").lower(),
            time=None,
            scraped_body=tale.body,
            url=f"https://{tale.slots['co'].lower()}.example/{rng.randrange(2000, 2030)}/{rng.randrange(99999)}",
        )
        return self._encode(text), []


def _pack(prompt: list[int], answers: list[tuple[list[int], list[int]]]) -> tuple[NDArray[np.int64], ...]:
    tokens, positions, groups, roles = (np.zeros(ROW_LENGTH, np.int64) for _ in range(4))
    groups[:] = -1
    if len(prompt) > ROW_LENGTH:
        raise ValueError(f"A prompt of {len(prompt)} tokens does not fit into a row of {ROW_LENGTH}.")
    used = len(prompt)
    tokens[:used], positions[:used], groups[:used], roles[:used] = prompt, range(used), 0, BODY
    for number, (answer, answer_roles) in enumerate(answers, 1):
        end = used + len(answer)
        if end > ROW_LENGTH:
            break
        tokens[used:end] = answer
        positions[used:end] = range(len(prompt), len(prompt) + len(answer))
        groups[used:end] = number
        roles[used:end] = answer_roles
        used = end
    return tokens, positions, groups, roles
