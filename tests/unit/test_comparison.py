"""The comparison: what it calls real, what it counts and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from comparison_parts import STORIES, World, run, six_runs, without_heldout

from tasks.titles.comparison import ComparedRun, Comparison
from tasks.titles.conclusions import FORMULAS, conclusions, same_loss, sentence
from tasks.titles.config import load_profile
from tasks.titles.errors import ConfigError
from tasks.titles.evaluation import Mode, best_of

SIX: list[tuple[Mode, int]] = [("sampled", 0), ("sampled", 1), *(("candidate", sample) for sample in range(2, 6))]


def test_a_real_effect_is_called_real_and_its_size_is_found() -> None:
    effects = {"art_best": 0.9, "trl_last": 0.9, "human": -0.5}
    covered = real = 0
    for luck in range(30):
        comparison = World(luck, art=0.9, trl=0.9, human=-0.5).comparison(six_runs())
        for method, effect in effects.items():
            found = comparison.difference(method, "base")
            assert found is not None and found.win_rate is not None
            assert (found.win_rate.mean > 0.5) is (effect > 0)
            covered += found.difference.low <= effect <= found.difference.high
            real += found.real
    assert covered >= 0.9 * 90
    assert real >= 0.9 * 90


def test_engines_that_do_the_same_are_called_different_about_5_times_in_100() -> None:
    real = 0
    for luck in range(120):
        world = World(luck, stories=20, of_seed=0.4, art=0.9, trl=0.9)
        found = world.comparison(six_runs()).difference("trl_best", "art_best")
        real += found is not None and found.real
    # 120 trials at 0.05 have a standard error of 0.02.
    assert real / 120 <= 0.11


def test_one_seed_has_no_spread_over_seeds() -> None:
    comparison = World(1, art=0.9, trl=0.9).comparison([run("art", 1), run("trl", 1)])
    found = comparison.difference("art_best", "base")
    assert found is not None and found.real
    assert sentence(found, 1).startswith("ART's best checkpoint earns ")
    assert any("another seed may turn the result" in line for line in conclusions(comparison))


def test_best_of_six_is_what_the_reward_model_likes_best_with_its_own_reward() -> None:
    world = World(1)
    titles = [world.title("base", 0, mode, sample, 0.0) for mode, sample in SIX]
    titles = [replace(title, score=float(sample), reward=9.0) for title, (_, sample) in zip(titles, SIX, strict=True)]
    unsupported = replace(titles[5], reward=0.0, verdict=False)
    greedy = replace(world.title("base", 0, "greedy", 0, 0.0), score=99.0)
    chosen = best_of([*titles[:5], unsupported, greedy])
    assert (chosen.writer, chosen.mode, chosen.sample) == ("best_of_6", "sampled", 0)
    assert (chosen.title, chosen.score, chosen.reward, chosen.verdict) == (unsupported.title, 5.0, 0.0, False)


def test_best_of_six_leaves_failures_and_blank_titles_out() -> None:
    world = World(1)
    title = replace(world.title("base", 0, "sampled", 0, 0.0), score=1.0)
    blank = replace(title, title="", score=None, reward=0.0, verdict=False)
    failed = replace(title, score=None, reward=None, verdict=None, failure="reward model: down")
    assert best_of([failed, blank, title, failed]).score == 1.0
    assert best_of([failed, blank, failed]).reward == 0.0
    assert best_of([failed, failed]).failure == "reward model: down"


def test_a_run_whose_best_checkpoint_is_its_last_writes_once() -> None:
    runs = [run("art", 1, best=40), run("trl", 1)]
    assert runs[0].writers() == {"art-1@best": 40}
    assert runs[1].writers() == {"trl-1@best": 20, "trl-1@last": 40}
    comparison = World(1, art=0.9).comparison(runs)
    assert comparison.methods["art_last"].steps == (40,)
    assert comparison.figures["art_last", "sampled"] == comparison.figures["art_best", "sampled"]


@pytest.mark.parametrize(
    "runs",
    [
        [run("art", 1)],
        [run("art", 1), run("art", 2), run("trl", 1)],
        [run("art", 1), run("trl", 2)],
        [run("art", 1), run("art", 1), run("trl", 1), run("trl", 1)],
    ],
)
def test_runs_that_do_not_pair_by_seed_are_refused(runs: list[ComparedRun]) -> None:
    with pytest.raises(ConfigError, match="same seeds, one run for each seed"):
        Comparison(runs[0].profile, runs, [], STORIES)


def test_a_failed_judgement_is_counted_and_no_zero() -> None:
    comparison = World(1).comparison(six_runs())
    lost = {"title": "?", "reward": None, "score": None, "heldout_score": None, "verdict": None, "length": None}
    titles = [
        replace(title, **lost, failure="validator: down")
        if title.writer == "art-1@best" and title.story_id == STORIES[0].story.id
        else title
        for title in comparison.titles
    ]
    with_failures = Comparison(comparison.profile, comparison.runs, titles, comparison.prompts)
    table = with_failures.table(with_failures.methods["art_best"], "sampled", "reward")
    assert np.argwhere(np.isnan(table)).tolist() == [[0, 0]]
    assert with_failures.figures["art_best", "sampled"].failed == 2
    assert any(line.startswith("3 of ") for line in conclusions(with_failures))


def test_the_alarm_rings_where_the_heldout_score_stays() -> None:
    assert World(1, art=0.9, trl=0.9).comparison(six_runs()).alarms[1:] == []  # best of six may ring by its nature
    rung = World(1, art=0.9, trl=0.9, heldout=0.0).comparison(six_runs()).alarms
    assert [alarm.partition(":")[0] for alarm in rung if not alarm.startswith("base model")] == [
        "ART best",
        "ART last",
        "TRL best",
        "TRL last",
    ]


def test_guards_warn_of_what_grew_over_the_base_model() -> None:
    comparison = World(1).comparison(six_runs())
    titles = [replace(one, title="WOW 🚀") if one.writer.startswith("trl") else one for one in comparison.titles]
    found = Comparison(comparison.profile, comparison.runs, titles, comparison.prompts).guards
    warned = {(guarded.method.id, guarded.mode) for guarded in found if guarded.warnings}
    assert warned == {(f"trl_{which}", mode) for which in ("best", "last") for mode in ("sampled", "greedy")}
    first_sentence = next(guarded for guarded in found if guarded.method.id == "first_sentence")
    assert first_sentence.warnings == []


@pytest.mark.parametrize(
    ("overrides", "same", "said"),
    [
        ([], False, "ART's loss was 'cispo', TRL's 'dapo': different formulas"),
        (
            ["loss.art=ppo", "loss.trl=grpo"],
            True,
            "ART's loss was 'ppo', TRL's 'grpo': on titles of the present policy",
        ),
        (["loss.art=ppo", "loss.trl=grpo", "kl_beta=0.1"], False, "different formulas"),
        (["loss.trl=cispo"], False, "ART's loss was 'cispo', TRL's 'cispo': different formulas"),
        (["updates_per_step=per_sequence"], False, "up to 48 a step; TRL makes one"),
    ],
)
def test_the_conclusions_say_which_losses_were_compared(overrides: list[str], same: bool, said: str) -> None:
    comparison = World(1, stories=20).comparison(six_runs(*overrides))
    assert same_loss(comparison) is same
    assert any(said in line for line in conclusions(comparison))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: World(1).comparison(six_runs()), "over stories and 3 seeds; with fewer than 5 seeds"),
        (lambda: World(1, stories=12).comparison(six_runs()), "With 12 test stories the intervals say little"),
        (
            lambda: World(1).comparison([run("art", 1, collapsed_at=30), run("trl", 1)]),
            "Run art-1 (ART, seed 1) collapsed at step 30",
        ),
        (
            lambda: World(1).comparison([run("art", 1), run("trl", 1, trajectories_dropped=7)]),
            "failed: ART 0 beside 1,900 kept, TRL 7 beside 1,900 kept.",
        ),
        (
            lambda: World(1).comparison([run("art", 1), run("trl", 1, "max_steps=90")]),
            "The runs differ in more than engine and seed: max_steps (60 and 90).",
        ),
        (lambda: without_heldout(World(1).comparison(six_runs())), "No held-out reward model judged"),
    ],
)
def test_the_conclusions_say_what_to_keep_in_mind(make: Callable[[], Comparison], said: str) -> None:
    assert [line for line in conclusions(make()) if said in line]


def test_a_calm_comparison_has_nothing_to_confess() -> None:
    runs = [run(engine, seed) for seed in range(1, 6) for engine in ("art", "trl")]
    found = conclusions(World(1, art=0.9, trl=0.9).comparison(runs))
    # Five differences and two lines about the losses.
    assert len(found) == 7


def test_sentences_give_size_direction_and_verdict() -> None:
    comparison = World(1, art=0.9, trl=0.9, human=-0.5).comparison(six_runs())
    said = {(found.after.id, found.before.id, found.measure): sentence(found, 3) for found in comparison.differences}
    up = comparison.difference("art_best", "base")
    assert up is not None
    low, mean, high = (f"{value:.2f}" for value in (up.difference.low, up.difference.mean, up.difference.high))
    assert said["art_best", "base", "reward"] == (
        f"ART's best checkpoints earn {mean} [{low}, {high}] more reward a title than the base model: "
        "a real difference."
    )
    down = comparison.difference("human", "base")
    assert down is not None
    low, mean, high = (f"{-value:.2f}" for value in (down.difference.high, down.difference.mean, down.difference.low))
    assert said["human", "base", "reward"] == (
        f"Human titles earn {mean} [{low}, {high}] less reward a title than the base model: a real difference."
    )
    assert said["best_of_6", "base", "score"].startswith("The best of 6 base-model titles scores ")
    assert said["trl_best", "art_best", "matches"] == (
        "TRL's best checkpoints get 0.0 [0.0, 0.0] percentage points more titles past the validator than ART's best "
        "checkpoints: too close to tell."
    )


def test_every_loss_of_a_profile_has_its_formula() -> None:
    losses = {
        (engine, name)
        for engine, field in type(load_profile("starter").loss).model_fields.items()
        for name in field.annotation.__args__  # type: ignore[union-attr]
    }
    assert losses == FORMULAS.keys()
