"""What a batch of rollouts amounts to, by the names of `metric_names`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tasks.titles import metric_names as names
from tasks.titles.group_statistics import count_groups, distinct_share, has_spread, summarise
from tasks.titles.rollout import Rollout, RolloutGroup


def rewards_of(group: RolloutGroup) -> list[float]:
    """Return the rewards of a group's valid trajectories."""
    return [rollout.reward for rollout in group.rollouts]


def trainable(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Return the groups whose rewards differ: only they have an advantage to learn from."""
    return [group for group in groups if has_spread(rewards_of(group))]


def train_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return means over all valid trajectories of a step's groups, and the counts of groups and trajectories.

    The score's mean leaves blank titles out: no reward model was asked for them.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    counts = count_groups([rewards_of(group) for group in groups])
    metrics = {
        names.TRAIN_REWARD: statistics.fmean(rollout.reward for rollout in rollouts),
        names.TRAIN_MATCHES: statistics.fmean(rollout.verdict for rollout in rollouts),
        names.TRAIN_LENGTH: statistics.fmean(rollout.length for rollout in rollouts),
        names.TRAIN_EMPTY_TITLES: statistics.fmean(rollout.empty for rollout in rollouts),
        names.TRAIN_DISTINCT_TITLES: distinct_share([[rollout.title for rollout in g.rollouts] for g in groups]),
        names.TRAIN_TRAJECTORIES: float(len(rollouts)),
        names.TRAIN_TOKENS: float(tokens_of(groups)),
        names.TRAIN_TRAJECTORIES_DROPPED: float(sum(len(group.failures) for group in groups)),
        names.TRAIN_GROUPS_SUBMITTED: float(counts.submitted),
        names.TRAIN_GROUPS_TRAINABLE: float(counts.trainable),
        names.TRAIN_GROUPS_WITHOUT_SPREAD: float(counts.without_spread),
        names.TRAIN_GROUPS_DROPPED: float(counts.dropped),
    }
    scores = _scores(rollouts)
    return metrics | ({names.TRAIN_SCORE: statistics.fmean(scores)} if scores else {})


def val_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return the summaries of reward, score, matches and length over validation titles."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    series = {
        names.VAL_REWARD: [rollout.reward for rollout in rollouts],
        names.VAL_SCORE: _scores(rollouts),
        names.VAL_MATCHES: [float(rollout.verdict) for rollout in rollouts],
        names.VAL_LENGTH: [float(rollout.length) for rollout in rollouts],
    }
    metrics = {
        f"{name}/{part}": value
        for name, values in series.items()
        if values
        for part, value in summarise(values).items()
    }
    return metrics | {names.VAL_TRAJECTORIES_DROPPED: float(sum(len(group.failures) for group in groups))}


def tokens_of(groups: Sequence[RolloutGroup]) -> int:
    """Return how many tokens were sampled."""
    return sum(rollout.tokens for group in groups for rollout in group.rollouts)


def why_nothing(groups: Sequence[RolloutGroup], batches: int) -> str:
    """Return why a number of batches in a row had nothing to train on."""
    counts = count_groups([rewards_of(group) for group in groups])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    unsupported = sum(not rollout.verdict for rollout in rollouts)
    empty = sum(rollout.empty for rollout in rollouts)
    return (
        f"{batches} batches in a row had nothing to train on: of {counts.submitted} groups {counts.without_spread} had "
        f"rewards that are all alike and {counts.dropped} had fewer than two titles; {unsupported} of "
        f"{len(rollouts)} titles were unsupported, {empty} of them blank. If the titles of a group are all alike or "
        "all unsupported, the base model or the learning rate is at fault; a larger group_size gives more spread, "
        "max_empty_batches more patience."
    )


def _scores(rollouts: Sequence[Rollout]) -> list[float]:
    return [rollout.score for rollout in rollouts if not rollout.empty]
