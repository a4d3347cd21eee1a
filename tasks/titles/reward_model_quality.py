"""How well the served reward model predicts the upvotes of human titles that it was not trained on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.starter.reward_labels import label, prediction_quality
from tasks.titles.story import Story

if TYPE_CHECKING:
    from reward_server.client import RewardClient

# A correlation of a few hundred pairs is known to about ±0.05; more would cost the reward server longer than it tells.
STORIES_AT_MOST = 300


async def reward_model_quality(stories: Sequence[Story], client: RewardClient) -> dict[str, float] | None:
    """Return RMSE in log upvotes, that of a constant, and Pearson and Spearman correlation on the test split.

    `stories` are all stories of the source, not only those above the minimum score: what lies below it is half
    of what the model has to tell apart. The constant is the mean of the training split. None where the test
    split is too small or too uniform for a correlation.

    Raises `ServiceError` where the reward server has no usable answer.
    """
    from reward_server.client import RewardInput

    usable = [story for story in stories if story.title.strip() and story.scraped_body.strip()]
    test = [story for story in usable if story.split == "test"]
    train_labels = [label(story.score) for story in usable if story.split == "train"]
    if not test or not train_labels:
        return None
    # Every n-th of the whole split, so that an ordered file does not give a slice of it.
    test = test[:: max(1, len(test) // STORIES_AT_MOST)][:STORIES_AT_MOST]
    scores = await client.score_batch([RewardInput.from_story(story, story.title) for story in test])
    try:
        return prediction_quality(
            [score.score for score in scores], [label(story.score) for story in test], statistics.fmean(train_labels)
        )
    except ValueError:
        return None
