"""What the commands print once their flow is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.execute import program

if TYPE_CHECKING:
    from rich.console import Console

    from tasks.reward_training.report import RewardModelReport
    from tasks.titles.comparison import Comparison
    from tasks.titles.promotion import Decision
    from tasks.titles.run_directory import RunDirectory
    from tasks.titles.suggestions import Suggestions
    from tasks.titles.summary import Evaluation


def show_results(out: Console, run_directory: RunDirectory, evaluation: Evaluation) -> None:
    """Print the tables of an evaluation."""
    from flows.terminal import results_table, table
    from tasks.titles import summary

    out.print()
    out.print(results_table(evaluation))
    failed = sum(title.failure is not None for title in evaluation.titles)
    if failed:
        out.print(f"{failed} of {len(evaluation.titles)} titles have no judgement and are left out.")
    out.print(summary.gain_sentence(evaluation))
    out.print(summary.reward_model_sentence(evaluation))
    out.print()
    rows = summary.sample_rows(evaluation, with_story=False)
    out.print(table(rows, "Titles side by side (greedy), their reward in brackets", lines=True))
    out.print()


def show_comparison(out: Console, home: RunDirectory, comparison: Comparison, titles: int) -> None:
    """Print a comparison's table, its conclusions and the titles of so many stories."""
    from flows.terminal import comparison_table, side_by_side_titles
    from tasks.titles.conclusions import conclusions

    out.print()
    out.print(comparison_table(comparison))
    for sentence in [*comparison.alarms, *conclusions(comparison)]:
        out.print(f"* {sentence}")
    if titles:
        out.print()
        out.print(side_by_side_titles(comparison, titles))
    out.print()


def show_trained(out: Console, run_directory: RunDirectory, run_name: str) -> None:
    """Print what comes after a training."""
    out.print(f"Evaluate it with: {program('hn-titles')} evaluate --run-name {run_name}", soft_wrap=True)


def show_reward_model(out: Console, run_directory: RunDirectory, report: RewardModelReport) -> None:
    """Print a reward model's figures and how to use it."""
    from flows.terminal import table

    out.print()
    out.print(table(report.rows(), "Figures in log upvotes; pairs: one story has at least twice the other's upvotes"))
    out.print(f"Use it with: {program('hn-titles')} run --set reward_model={report.registered}", soft_wrap=True)
    out.print(f"Its files: {report.folder}", soft_wrap=True)


def show_promotion(out: Console, run_directory: RunDirectory, decision: Decision) -> None:
    """Print what was decided and why."""
    out.print()
    out.print(decision.reason)
    if decision.judged_again:
        out.print(f"Both were judged again, as their evaluations differed in {', '.join(decision.judged_again)}.")
    out.print()


def show_suggestions(found: Suggestions) -> None:
    """Print titles by rank, and what a reader should know of them."""
    from flows.terminal import plain_console, table

    out = plain_console()
    out.print(table(found.rows(), f"Titles for {found.source} by {found.writer}"))
    for note in found.notes():
        out.print(note)
