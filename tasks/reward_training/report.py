"""What came of training a reward model: figures for people, JSON and MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.reward_training.quality import Quality
from tasks.reward_training.stories import LabelledStories
from tasks.titles.story import Split

_COLUMNS = {
    "stories": "stories",
    "rmse": "RMSE",
    "rmse_baseline": "RMSE of the mean",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "pairwise_accuracy": "pairs right",
    "calibration_error": "calibration error",
}


@dataclass(frozen=True)
class TrainedRewardModel:
    """A reward model that was trained to its last step."""

    steps: int
    figures: Mapping[Split, Quality]
    cut: int
    """Training stories whose body lost its end."""
    dropped: Mapping[str, int]
    """Stories that could not be encoded, by reason."""


@dataclass(frozen=True)
class RewardModelReport:
    """A reward model, its figures and where it lies."""

    run_name: str
    stories: LabelledStories
    trained: TrainedRewardModel
    folder: str
    """The adapter's folder."""
    registered: str
    """`models:/<name>/<version>`"""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "run": self.run_name,
            "source": self.stories.source,
            "label": "natural logarithm of max(score, 1)",
            "splits": self.stories.rule,
            "stories": {split: len(stories) for split, stories in self.stories.by_split.items()},
            "dropped": {**self.stories.dropped, **self.trained.dropped},
            "bodies_cut": self.trained.cut,
            "train_label_mean": self.stories.train_mean,
            "steps": self.trained.steps,
            "folder": self.folder,
            "registered": self.registered,
            "figures": {split: found.as_dict() for split, found in self.trained.figures.items()},
        }

    def rows(self) -> list[dict[str, str]]:
        """Return one row of texts per split."""
        return [
            {"split": split, **{title: _text(getattr(found, name)) for name, title in _COLUMNS.items()}}
            for split, found in self.trained.figures.items()
        ]

    def markdown(self, links: Sequence[str]) -> str:
        """Return the figures as a page of Markdown."""
        calibration = [
            {
                "decile": str(number),
                **{
                    f"{split} {word}": _text(getattr(found.deciles[number - 1], word))
                    for split, found in self.trained.figures.items()
                    if number <= len(found.deciles)
                    for word in ("predicted", "observed")
                },
            }
            for number in range(1, 1 + max(len(found.deciles) for found in self.trained.figures.values()))
        ]
        return "\n".join(
            [
                f"# Reward model of {self.run_name}",
                f"{self.stories.source}: {self.stories.as_line()}. {self.stories.rule}",
                "",
                *_table(self.rows()),
                "",
                "Errors are in log upvotes. A pair is two stories of which one has at least twice the other's upvotes.",
                "",
                "## Calibration by decile of the prediction",
                "",
                *_table(calibration),
                "",
                f"Registered as `{self.registered}`, files in `{self.folder}`.",
                "",
                *(f"* {link}" for link in links),
            ]
        )


def _text(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
