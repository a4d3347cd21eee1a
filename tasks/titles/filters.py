"""Which stories become prompts, and why the others do not.

Every function takes stories and gives back what it kept, in the order it came, and what it dropped
with the reason. What is kept never depends on the order of the input.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from tasks.titles.prompts import policy_messages
from tasks.titles.story import SPLITS, Prompt, Split, Story


class Reason(StrEnum):
    """Why a row of the source is no prompt; the values are the words of the report."""

    BROKEN_LINE = "line is no JSON object"
    NO_ID = "no usable id"
    UNKNOWN_SPLIT = "unknown split"
    NO_SCORE = "no usable score"
    TITLE_NOT_TEXT = "title is not text"
    BODY_NOT_TEXT = "body is not text"
    LOW_SCORE = "score below the minimum"
    EMPTY_BODY = "empty body"
    EMPTY_TITLE = "empty title"
    DUPLICATE_ID = "duplicate id"
    DUPLICATE_BODY = "duplicate body"
    TOKENISER_ERROR = "tokeniser error"
    TOO_LONG = "prompt too long"


Dropped = list[tuple[Story, Reason]]


@dataclass(frozen=True)
class Division:
    """How a source that lacks a split gets one: shares of the split `of`, in the order of `shares`."""

    of: Split
    shares: Mapping[Split, float]
    note: str
    """One sentence for the report."""


def stable_hash(purpose: str, text: str) -> int:
    """Return 64 bits that depend on nothing but the two strings; purposes are independent of each other."""
    data = f"{purpose}:{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def normalise_body(body: str) -> str:
    """Return `body` with case, white space and Unicode's compatible spellings evened out."""
    return " ".join(unicodedata.normalize("NFKC", body).casefold().split())


def is_blank(text: str) -> bool:
    """Tell whether `text` shows nothing: white space, control and invisible formatting characters only."""
    return all(character.isspace() or unicodedata.category(character) in {"Cc", "Cf"} for character in text)


def filter_content(stories: Sequence[Story], minimum_score: int) -> tuple[list[Story], Dropped]:
    """Drop stories with fewer than `minimum_score` upvotes, without a body or without a title."""
    kept: list[Story] = []
    dropped: Dropped = []
    for story in stories:
        if story.score < minimum_score:
            dropped.append((story, Reason.LOW_SCORE))
        elif is_blank(story.scraped_body):
            dropped.append((story, Reason.EMPTY_BODY))
        elif is_blank(story.title):
            dropped.append((story, Reason.EMPTY_TITLE))
        else:
            kept.append(story)
    return kept, dropped


def filter_duplicates(stories: Sequence[Story]) -> tuple[list[Story], Dropped]:
    """Keep one story of each id, then one of each normalised body, over all splits together.

    The copy in test goes before the one in val, and that before the one in train, so that no story
    leaks from training into an evaluation and the evaluations keep their size.
    """
    kept, same_id = _first_of_each(stories, lambda story: story.id, Reason.DUPLICATE_ID)
    kept, same_body = _first_of_each(kept, _body_digest, Reason.DUPLICATE_BODY)
    return kept, same_id + same_body


def filter_length(
    stories: Sequence[Story], lengths: Sequence[int | None], max_prompt_tokens: int
) -> tuple[list[Prompt], Dropped]:
    """Make prompts of the stories whose prompt has at most `max_prompt_tokens` tokens.

    `lengths` holds the tokens of each story's prompt, None where the tokenizer failed on it.
    """
    prompts: list[Prompt] = []
    dropped: Dropped = []
    for story, tokens in zip(stories, lengths, strict=True):
        if tokens is None:
            dropped.append((story, Reason.TOKENISER_ERROR))
        elif tokens > max_prompt_tokens:
            dropped.append((story, Reason.TOO_LONG))
        else:
            prompts.append(Prompt(story, policy_messages(story.scraped_body), tokens))
    return prompts, dropped


def divide(prompts: Sequence[Prompt], division: Division) -> tuple[list[Prompt], dict[Split, int]]:
    """Move the shares of `division` from its split into the new ones, by the rank of a hash of the id.

    Returns all prompts, and how many each split gained (less than 0: lost).

    It comes after the filters, so that a split with few good prompts is still shared out as the division
    says, and each new split gets at least one. A prompt more in the source moves at most one other per border.
    """
    ranked = [prompt.story.id for prompt in _ranked("divide", prompts) if prompt.story.split == division.of]
    moved: dict[str, Split] = {}
    gained: Counter[Split] = Counter()
    start = 0
    for split, share in division.shares.items():
        end = start + max(1, round(share * len(ranked)))
        moved |= dict.fromkeys(ranked[start:end], split)
        start = end
    divided = []
    for prompt in prompts:
        split = moved.get(prompt.story.id, prompt.story.split)
        if split != prompt.story.split:
            gained[prompt.story.split] -= 1
            gained[split] += 1
            prompt = replace(prompt, story=replace(prompt.story, split=split))
        divided.append(prompt)
    return divided, dict(gained)


def choose(prompts: Sequence[Prompt], limits: Mapping[Split, int]) -> tuple[list[Prompt], list[Prompt]]:
    """Return at most `limits[split]` prompts of each split, and the rest, both ordered by a hash of the id.

    The hash makes the choice stable: a row more in the source displaces at most one prompt. It leaves
    the profile's seed out, so that runs with different seeds are measured on the same stories.
    """
    chosen: list[Prompt] = []
    beyond: list[Prompt] = []
    ordered = _ranked("choose", prompts)
    for split in SPLITS:
        members = [prompt for prompt in ordered if prompt.story.split == split]
        chosen += members[: limits[split]]
        beyond += members[limits[split] :]
    return chosen, beyond


def _ranked(purpose: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: (stable_hash(purpose, prompt.story.id), prompt.story.id))


def _first_of_each(
    stories: Sequence[Story], key: Callable[[Story], Hashable], reason: Reason
) -> tuple[list[Story], Dropped]:
    best: dict[Hashable, int] = {}
    keys = [key(story) for story in stories]
    for index in sorted(range(len(stories)), key=lambda index: _precedence(stories[index])):
        best.setdefault(keys[index], index)
    kept = [story for index, story in enumerate(stories) if best[keys[index]] == index]
    dropped = [(story, reason) for index, story in enumerate(stories) if best[keys[index]] != index]
    return kept, dropped


def _precedence(story: Story) -> tuple[int, int, str]:
    # The hash keeps the choice from favouring old ids; the text tells rows of one id apart in any order.
    return -SPLITS.index(story.split), stable_hash("duplicates", story.id), repr(story)


def _body_digest(story: Story) -> bytes:
    # A digest in place of the text: a second copy of every body would double the memory.
    return hashlib.sha256(normalise_body(story.scraped_body).encode("utf-8", "surrogatepass")).digest()
