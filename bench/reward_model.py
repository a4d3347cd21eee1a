"""How good a reward model trained here is: `python -m bench.reward_model STORIES.parquet`.

It trains reward models on the settled stories of a parquet file, as `hn-titles train-reward-model` does, and prints
their figures beside two cheap references and the published experiment. In a file that was gathered from several
sources, the source alone tells much of a score (column `body_source`): each correlation is also given within sources.
Rows whose `score_kind` is 'early' were read within hours; they are no labels, left out and counted. The result is a
table and bench/reward_model.json.

`--random-qwen-0.5b STEPS` does something else: it measures speed and memory of so many steps on a model of that size
with random weights, with the settings of the profile qwen-0.5b, and writes bench/reward_model_speed.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.random_model import random_qwen
from bench.references import source_means, word_ridge
from bench.settled_stories import SettledStories, SplitBy, last_training_day, read_settled, within_sources
from bench.timed_training import Cost, Progress, Training, timed_training
from reward_server.scorer import Scorer
from tasks.reward_training.quality import Quality, quality
from tasks.reward_training.stories import LabelledStories, labelled_stories
from tasks.starter.paths import BASE_MODEL
from tasks.starter.reward_labels import label
from tasks.titles.config import RewardTraining, load_profile
from tasks.titles.errors import UserError
from tasks.titles.story import Split

RESULT = Path(__file__).with_suffix(".json")
SPEED_RESULT = RESULT.with_stem("reward_model_speed")
RANDOM_PROFILE = "qwen-0.5b"
TABLE_WIDTH = 150
PUBLISHED = {"split": "test", "stories": None, "rmse": 1.13, "rmse_baseline": 1.33, "pearson": 0.53}
"""Of the published experiment's model: 1B parameters, 300,000 stories with bodies."""
COLUMNS = {
    "split_by": "split by",
    "split": "split",
    "predictor": "predictor",
    "stories": "stories",
    "rmse": "RMSE",
    "rmse_baseline": "RMSE of the mean",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "pairwise_accuracy": "pairs right",
    "pearson_within_sources": "Pearson within sources",
    "stories_within_sources": "stories of these",
}
"""How the table calls the keys of a row."""


@dataclass(frozen=True)
class Row:
    """What one predictor is worth on one split."""

    split_by: SplitBy
    split: Split
    predictor: str
    quality: Quality
    pearson_within_sources: float | None
    stories_within_sources: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the quality's among them."""
        values = {**asdict(self), **self.quality.as_dict()}
        return {name: value for name, value in values.items() if name not in ("quality", "deciles")}


@dataclass(frozen=True)
class Run:
    """A training on one division of the stories."""

    split_by: SplitBy
    settled: SettledStories
    stories: LabelledStories
    cost: Cost
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "split_by": self.split_by,
            "splits": self.stories.rule,
            "stories": {split: len(stories) for split, stories in self.stories.by_split.items()},
            "early_left_out": self.settled.early,
            "dropped": self.stories.dropped,
            "cost": asdict(self.cost),
            "figures": [row.as_dict() for row in self.rows],
        }

    def sentence(self) -> str:
        """Return what went in and what it took."""
        cost = self.cost
        return (
            f"split by {self.split_by}: {self.stories.as_line()}, {self.settled.early} early ones left out.\n"
            f"{cost.steps} steps in {cost.training_s:.0f} s, {cost.step_s:.2f} s a step, "
            f"{cost.tokens_per_s:.0f} tokens/s, peak memory {cost.peak_memory_mb:.0f} MB; "
            f"{cost.story_tokens:.0f} tokens a story, at most {cost.longest_story_tokens}; "
            f"{cost.bodies_cut} bodies cut."
        )


def run(split_by: SplitBy, settings: RewardTraining, options: argparse.Namespace, progress: Progress) -> Run:
    """Train on one division of the stories, and judge unless the weights are random."""
    settled = read_settled(options.stories)
    if split_by == "own":
        settings = settings.model_copy(update={"train_until": None})
    elif settings.train_until is None:
        settings = settings.model_copy(update={"train_until": last_training_day(settled.loaded.stories)})
    stories = labelled_stories(settled.loaded, settings)
    with tempfile.TemporaryDirectory() as folder:
        training = timed_training(
            Path(folder), stories, settings, seed=options.seed, device=options.device, progress=progress
        )
        rows = []
        if options.random_steps is None:
            rows = rows_of(split_by, settled, stories, training, settings, options.device)
    return Run(split_by, settled, stories, training.cost, rows)


def rows_of(
    split_by: SplitBy,
    settled: SettledStories,
    stories: LabelledStories,
    training: Training,
    settings: RewardTraining,
    device: str,
) -> list[Row]:
    """Return a row for each split and predictor; the references on splits that they were not fitted to."""
    scorer = Scorer(training.files, device=device, dtype=torch.float32, max_length=settings.max_length)
    train = stories.by_split["train"]
    rows = []
    for split, judged in training.judged.items():
        scores = [story.score for story in judged.stories]
        labels = [label(score) for score in scores]
        sources = [settled.sources.get(story.id) for story in judged.stories]
        served: list[float] = []
        for start in range(0, len(judged), settings.eval_batch_size):
            batch = judged.ids[start : start + settings.eval_batch_size]
            served += scorer.score_tokens([ids.tolist() for ids in batch])
        found = [("reward model", served, training.trained.figures[split])]
        if split != "train":
            references = {
                "ridge on words": word_ridge(train, judged.stories),
                "mean of the source": source_means(train, judged.stories, settled.sources),
            }
            found += [
                (name, values, quality(values, scores, stories.train_mean)) for name, values in references.items()
            ]
        rows += [
            Row(split_by, split, name, figures, *within_sources(values, labels, sources))
            for name, values, figures in found
        ]
    return rows


class Tenths:
    """Tells how far a training is, in a line for each tenth of a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        tenth = 10 * done // total
        if tenth > self._told.get(stage, -1):
            self._told[stage] = tenth
            self._console.print(f"{stage} {done}/{total} {note}")


def table_of(rows: Sequence[Mapping[str, Any]], source: str) -> Table:
    """Return the rows as people read them, the published experiment's last."""
    table = Table(title=f"Reward models on {source}; errors are in log upvotes")
    for title in COLUMNS.values():
        table.add_column(title, no_wrap=title == "predictor")
    for row in [*rows, {"predictor": "published experiment: 1B, 300,000 stories", **PUBLISHED}]:
        table.add_row(*(_text(row.get(key)) for key in COLUMNS))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = command_line().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, TABLE_WIDTH)
    runs = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(options, Path(folder))
            for split_by in options.split:
                runs.append(run(split_by, settings, options, Tenths(console)))
                console.print(runs[-1].sentence())
    except UserError as error:
        console.print(str(error), soft_wrap=True)
        return error.exit_code
    rows = [row.as_dict() for found in runs for row in found.rows]
    if rows:
        console.print(table_of(rows, options.stories.name))
    result = {
        "source": options.stories.name,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "base_model": "random weights" if options.random_steps is not None else Path(settings.base_model).name,
        "settings": settings.model_dump(mode="json", exclude={"base_model", "registered_name"}),
        "runs": [found.as_dict() for found in runs],
        "published": PUBLISHED,
    }
    out = options.out or (RESULT if rows else SPEED_RESULT)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(str(out), soft_wrap=True)
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Measures reward models on real stories.")
    parser.add_argument("stories", type=Path, help="a parquet file")
    parser.add_argument("--split", nargs="+", choices=("time", "own"), default=["time"], help="a training for each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", help="whose reward_training settings hold (default: starter)")
    parser.add_argument("--base-model", help="'starter' or a folder")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another such setting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, help="CPU threads; unset: PyTorch decides")
    parser.add_argument("--random-qwen-0.5b", type=int, dest="random_steps", metavar="STEPS")
    parser.add_argument("--tokenizer", type=Path, default=BASE_MODEL, help="folder; of the random model")
    parser.add_argument("--out", type=Path)
    return parser


def settings_of(options: argparse.Namespace, folder: Path) -> RewardTraining:
    """Return the profile's settings with the changes that `options` make; a random model lies in `folder`."""
    changes = {"base_model": options.base_model, "max_length": options.max_length, "epochs": options.epochs}
    profile = options.profile or "starter"
    # A number of epochs is meant: the profile's bound on the steps goes.
    overrides = ["max_steps=null"] if options.epochs is not None else []
    if options.random_steps is not None:
        profile = options.profile or RANDOM_PROFILE
        changes["base_model"] = random_qwen(folder / "random", options.tokenizer)
        # A step needs one epoch at most. Two stories are the fewest that figures are made of; nobody reads these.
        changes |= {"max_steps": options.random_steps, "epochs": options.random_steps, "report_stories": 2}
    overrides += [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    return load_profile(profile, [f"reward_training.{change}" for change in [*overrides, *options.set]]).reward_training


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
