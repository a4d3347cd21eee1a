"""Stories as the tokens that a reward model reads, and batches of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from reward_server.encoding import cut_body, tokenize
from reward_server.errors import BadInput
from tasks.starter.reward_labels import label
from tasks.starter.train_reward import text_of
from tasks.titles.filters import Reason
from tasks.titles.story import Story

logger = logging.getLogger(__name__)

TITLE_TOO_LONG = "title, URL and submitter too long"
_BATCH = 256  # a fast tokenizer works on the rows of one call in parallel


@dataclass
class EncodedStories(Dataset):
    """Stories with their token ids; what could not be encoded is not among them and counted."""

    stories: list[Story] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    cut: int = 0
    """Stories whose body lost its end."""
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.stories)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self.ids[index], "label": label(self.stories[index].score)}

    def by_length(self) -> EncodedStories:
        """Return the same stories, the longest first: batches of like length need little padding."""
        order = sorted(range(len(self)), key=lambda index: -len(self.ids[index]))
        return EncodedStories(
            [self.stories[index] for index in order], [self.ids[index] for index in order], self.cut, self.dropped
        )


def encode_stories(
    tokenizer: Any, stories: Sequence[Story], max_length: int, progress: Callable[[int], None] | None = None
) -> EncodedStories:
    """Return `stories` under their human titles as at most `max_length` tokens; only a body is ever cut.

    `progress` hears how many stories are done.
    """
    encoded = EncodedStories()
    for start in range(0, len(stories), _BATCH):
        batch = stories[start : start + _BATCH]
        texts = [text_of(story) for story in batch]
        for story, text, ids in zip(batch, texts, _tokens(tokenizer, texts), strict=True):
            if ids is None:
                encoded.dropped[Reason.TOKENISER_ERROR] += 1
                continue
            if len(ids) > max_length:
                try:
                    ids = cut_body(tokenizer, text, max_length)
                except BadInput:
                    encoded.dropped[TITLE_TOO_LONG] += 1
                    continue
                encoded.cut += 1
            encoded.stories.append(story)
            # Four bytes a token: lists of a large data set would not fit into memory.
            encoded.ids.append(np.asarray(ids, dtype=np.int32))
        if progress is not None:
            progress(start + len(batch))
    return encoded


def collate(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """Return a batch, padded right: `input_ids` and `attention_mask` [stories, longest], and `labels` [stories]."""
    longest = max(len(row["ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        input_ids[number, : len(row["ids"])] = torch.from_numpy(row["ids"])
        mask[number, : len(row["ids"])] = 1
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.float32)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int] | None]:
    """Return each text's tokens, None where the tokenizer fails on it (a body need not be valid Unicode)."""
    try:
        return list(tokenize(tokenizer, texts, verbose=False)["input_ids"])
    except Exception as error:
        if len(texts) == 1:
            logger.warning("The tokenizer failed on a story: %s: %s", type(error).__name__, error)
            return [None]
        return [ids for text in texts for ids in _tokens(tokenizer, [text])]
