"""The figures of an evaluated run: as JSON, as tables and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.titles.config import Profile
from tasks.titles.evaluation import HUMAN, MEASURES, EvaluatedTitle, Figures, figures, reward_gain
from tasks.titles.ruler import Ruler
from tasks.titles.statistics import Interval

SAMPLE_STORIES = 6
FEWEST_STORIES = 20
"""Test stories below which the headline warns: a bootstrap over fewer is far too sure of itself."""
HEADINGS = {"heldout_score": "held-out"}
"""How a measure is called in tables, where not by its own name."""
DIGITS = {"length": 0}
"""Digits behind the point, where not two."""
_WRITERS = {HUMAN: "human titles", "base": "base model", "best": "best checkpoint"}


@dataclass(frozen=True)
class TrainingFacts:
    """What the evaluation needs to know of the training."""

    engine: str
    steps: int
    best_step: int
    seconds: float
    trajectories_dropped: int
    collapsed_at: int | None
    mlflow_run_id: str


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found out about a run on the test stories."""

    run_name: str
    profile: Profile
    training: TrainingFacts
    titles: Sequence[EvaluatedTitle]
    figures: Sequence[Figures]
    """Base, best and (where it is another checkpoint) last: sampled, then human titles, then greedy ones."""
    gain: Interval
    ratio: Interval | None
    ruler: Ruler
    """What the titles were measured with."""
    reward_model: Mapping[str, float] | None
    seconds: float
    """Wall clock of the evaluation."""

    @property
    def test_stories(self) -> int:
        """How many stories were evaluated."""
        return len({title.story_id for title in self.titles})

    def of(self, writer: str, mode: str) -> Figures:
        """Return one writer's figures; the last checkpoint's are the best one's where they are one."""
        for found in self.figures:
            if found.writer == writer and found.mode == mode:
                return found
        if writer == "last":
            return self.of("best", mode)
        raise KeyError((writer, mode))

    def summary(self) -> dict[str, Any]:
        """Return what summary.json holds; the headline figures are those of titles sampled at temperature 1."""
        best = self.of("best", "sampled").as_dict()
        best["reward_gain"] = self.gain.as_dict()
        best["reward_ratio"] = self.ratio.as_dict() if self.ratio else None
        return {
            "run": self.run_name,
            "engine": self.training.engine,
            "profile": self.profile.name,
            "steps": self.training.steps,
            "seconds": self.training.seconds + self.seconds,
            "base": self.of("base", "sampled").as_dict(),
            "best": best,
            "last": self.of("last", "sampled").as_dict(),
            "human": self.of(HUMAN, "human").as_dict(),
            "greedy": {writer: self.of(writer, "greedy").as_dict() for writer in ("base", "best", "last")},
            "best_step": self.training.best_step,
            "mlflow_run_id": self.training.mlflow_run_id,
            "reward_model": dict(self.reward_model) if self.reward_model else None,
            "judged_with": self.ruler.as_dict(),
            "test_stories": self.test_stories,
            "failed_judgements": sum(title.failure is not None for title in self.titles),
            "trajectories_dropped": self.training.trajectories_dropped,
            "collapsed_at": self.training.collapsed_at,
            "train_seconds": self.training.seconds,
            "evaluation_seconds": self.seconds,
        }


def evaluate_figures(
    run_name: str,
    profile: Profile,
    training: TrainingFacts,
    titles: Sequence[EvaluatedTitle],
    *,
    ruler: Ruler,
    reward_model: Mapping[str, float] | None,
    seconds: float,
) -> Evaluation:
    """Compute every figure of the evaluated `titles`."""
    keys = dict.fromkeys((title.writer, title.mode) for title in titles)
    order = {"sampled": 0, "human": 1, "greedy": 2}
    gain, ratio = reward_gain(titles, profile)
    return Evaluation(
        run_name=run_name,
        profile=profile,
        training=training,
        titles=titles,
        figures=[figures(titles, *key, profile) for key in sorted(keys, key=lambda key: order[key[1]])],
        gain=gain,
        ratio=ratio,
        ruler=ruler,
        reward_model=reward_model,
        seconds=seconds,
    )


def metrics(evaluation: Evaluation, writer: str) -> dict[str, float]:
    """Return a writer's test figures by metric name: `test/reward/mean`, `test/greedy/reward/mean` and so on."""
    named: dict[str, float] = {}
    for mode, prefix in (("sampled", "test"), ("greedy", "test/greedy")):
        for name, interval in evaluation.of(writer, mode).measures.items():
            if interval is not None:
                named |= {f"{prefix}/{name}/{part}": value for part, value in interval.as_dict().items()}
    return named


def writer_name(evaluation: Evaluation, writer: str) -> str:
    """Return how a writer is called in tables."""
    steps = {"best": evaluation.training.best_step, "last": evaluation.training.steps}
    return f"{writer}, step {steps[writer]}" if writer in steps else _WRITERS[writer]


def table_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the table of results as text: one row per writer and mode, one column per measure."""
    rows = []
    for found in evaluation.figures:
        row = {"titles of": writer_name(evaluation, found.writer), "how": "-" if found.mode == "human" else found.mode}
        row |= {HEADINGS.get(name, name): format_interval(found.measures[name], name) for name in MEASURES}
        row["distinct"] = f"{found.distinct:.0%}"
        row["failed"] = str(found.failed)
        rows.append(row)
    return rows


def sample_rows(
    evaluation: Evaluation, count: int = SAMPLE_STORIES, *, with_story: bool = True
) -> list[dict[str, str]]:
    """Return a few stories' titles side by side: the human one and two greedy ones (base model, best checkpoint)."""
    by_story: dict[str, dict[str, EvaluatedTitle]] = {}
    for title in evaluation.titles:
        if title.mode != "sampled":
            by_story.setdefault(title.story_id, {})[title.writer] = title
    rows = []
    for story, writers in list(by_story.items())[:count]:
        row = {"story": story} if with_story else {}
        for writer in (HUMAN, "base", "best"):
            row[_WRITERS[writer]] = title_cell(writers[writer])
        rows.append(row)
    return rows


def gain_sentence(evaluation: Evaluation) -> str:
    """Return the headline: how much more reward the best checkpoint's sampled titles earn."""
    gain = evaluation.gain
    times = f", {evaluation.ratio.mean:.2f} times the base model's" if evaluation.ratio else ""
    return (
        f"Reward of the best checkpoint minus the base model's, story by story: {gain.mean:+.2f} "
        f"({gain.low:+.2f} to {gain.high:+.2f}){times}.{_few_stories(evaluation)}"
    )


def _few_stories(evaluation: Evaluation) -> str:
    count = evaluation.test_stories
    if count >= FEWEST_STORIES:
        return ""
    return f" With {'one test story' if count == 1 else f'{count} test stories'} the intervals say little."


def reward_model_sentence(evaluation: Evaluation) -> str:
    """Return how good the reward model is at what it was trained for."""
    quality = evaluation.reward_model
    if not quality:
        return "The reward model was not compared with real upvotes: the test split is too small or too uniform."
    return (
        f"Reward model against log upvotes of the test split's human titles: RMSE {quality['rmse']:.2f} "
        f"(a constant: {quality['rmse_baseline']:.2f}), Pearson {quality['pearson']:.2f}, "
        f"Spearman {quality['spearman']:.2f}."
    )


def markdown(evaluation: Evaluation, links: Sequence[str] = ()) -> str:
    """Return the report as Markdown; `links` are lines that lead to MLflow and the run directory."""
    training = evaluation.training
    parts = [
        f"# {evaluation.run_name}",
        f"{training.engine}, profile {evaluation.profile.name}: {training.steps} steps in {training.seconds:.0f} s, "
        f"best checkpoint at step {training.best_step}, {training.trajectories_dropped} trajectories dropped.",
        gain_sentence(evaluation),
        markdown_table(table_rows(evaluation)),
        "Means over the test stories with 95% bootstrap intervals; lengths in characters, held-out: the score of the "
        "reward model that training never saw. Sampled: at temperature 1, as in training; the headline figures are "
        "these. Greedy: the likeliest title, as a user would ask for it.",
        reward_model_sentence(evaluation),
        "## Greedy titles, with their reward",
        markdown_table(sample_rows(evaluation)),
    ]
    if training.collapsed_at is not None:
        parts.insert(2, f"**The reward collapsed at step {training.collapsed_at}: lower the learning rate.**")
    parts += [f"* {line}" for line in links]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of text as a Markdown table; a cell's own bars and line breaks cannot break it."""
    if not rows:
        return ""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[name] for name in header] for row in rows]]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def title_cell(title: EvaluatedTitle) -> str:
    """Return a title with its reward in brackets."""
    reward = "not judged" if title.reward is None else f"{title.reward:.2f}"
    return f"{title.title or '(no title)'} [{reward}]"


def format_interval(interval: Interval | None, measure: str) -> str:
    """Return `2.31 [2.20, 2.42]`, with the digits that suit the measure; a dash where there is none."""
    if interval is None:
        return "-"
    digits = DIGITS.get(measure, 2)
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
