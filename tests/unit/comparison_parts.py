"""What the tests of the comparison share: runs, and a world whose titles have known effects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tasks.starter.world import generate_stories
from tasks.titles.comparison import ComparedRun, Comparison
from tasks.titles.config import EngineName, load_profile
from tasks.titles.curves import CurvePoint, TimeSplit
from tasks.titles.evaluation import EvaluatedTitle, Mode, best_of
from tasks.titles.prompts import policy_messages
from tasks.titles.story import Prompt
from tasks.titles.summary import TrainingFacts

STORIES = [Prompt(story, policy_messages(story.scraped_body), 100) for story in generate_stories(60)]


def run(engine: EngineName, seed: int, *overrides: str, best: int = 20, **facts: Any) -> ComparedRun:
    profile = load_profile("starter", [f"engine={engine}", f"seed={seed}", "bootstrap_samples=200", *overrides])
    training = {
        "engine": engine,
        "steps": 40,
        "best_step": best,
        "seconds": 120.0,
        "trajectories_dropped": 0,
        "collapsed_at": None,
        "mlflow_run_id": "abc",
    }
    return ComparedRun(
        run_name=f"{engine}-{seed}",
        profile=profile,
        training=TrainingFacts(**(training | facts)),
        curve=[
            CurvePoint(0, 0, 0, 0.0, 0.0, None, None, 2.0),
            CurvePoint(40, 1900, 30_000, 120.0, 120.0, None, 2.9, 3.0),
        ],
        time_per_step=TimeSplit(1.0, 0.5, 1.2, 0.1),
        peak_memory_mb=900.0,
    )


class World:
    """Titles whose reward is a story's level, plus a method's effect, plus luck of the seed and of the title."""

    def __init__(
        self, luck: int, *, stories: int = 60, of_seed: float = 0.1, of_title: float = 1.0, **effects: float
    ) -> None:
        self.random = np.random.default_rng(luck)
        self.prompts = STORIES[:stories]
        self.levels = self.random.normal(3.0, 1.0, size=stories)
        self.of_seed, self.of_title = of_seed, of_title
        self.effects = effects

    def titles(self, writer: str, effect: float, heldout: float = 0.0) -> list[EvaluatedTitle]:
        """Return what a model writes: two sampled titles and a greedy one for each story."""
        effect += float(self.random.normal(0, self.of_seed)) if "@" in writer else 0.0
        modes: tuple[tuple[Mode, int], ...] = (("sampled", 0), ("sampled", 1), ("greedy", 0))
        return [
            self.title(writer, place, mode, sample, effect, heldout)
            for place in range(len(self.prompts))
            for mode, sample in modes
        ]

    def title(
        self, writer: str, place: int, mode: Mode, sample: int, effect: float, heldout: float = 0.0
    ) -> EvaluatedTitle:
        score = float(self.levels[place] + effect + self.random.normal(0, self.of_title))
        text = f"A plain title of {writer}, number {sample} of story {place}"
        return EvaluatedTitle(
            story_id=self.prompts[place].story.id,
            writer=writer,
            mode=mode,
            sample=sample,
            title=text,
            reward=score,
            score=score,
            heldout_score=float(self.levels[place] + heldout + self.random.normal(0, self.of_title)),
            verdict=True,
            length=len(text),
        )

    def comparison(self, runs: list[ComparedRun]) -> Comparison:
        """Let every writer write, with the effects of "art", "trl", "human" and "heldout" (of every trained one)."""
        titles = self.titles("base", 0.0)
        for place in range(len(self.prompts)):
            own = [title for title in titles if title.story_id == self.prompts[place].story.id]
            candidates = [self.title("base", place, "candidate", sample, 0.0) for sample in range(2, 6)]
            titles += [*candidates, best_of([*own, *candidates])]
            titles.append(self.title("human", place, "human", 0, self.effects.get("human", 0.0)))
            titles.append(self.title("first_sentence", place, "text", 0, -1.0))
        for one in runs:
            for writer in one.writers():
                effect = self.effects.get(one.engine, 0.0)
                titles += self.titles(writer, effect, self.effects.get("heldout", effect))
        return Comparison(runs[0].profile, runs, titles, self.prompts)


def six_runs(*overrides: str, **changes: Any) -> list[ComparedRun]:
    return [run(engine, seed, *overrides, **changes) for seed in (2, 1, 3) for engine in ("trl", "art")]


def without_heldout(comparison: Comparison) -> Comparison:
    titles = [replace(title, heldout_score=None) for title in comparison.titles]
    return Comparison(comparison.profile, comparison.runs, titles, comparison.prompts)
