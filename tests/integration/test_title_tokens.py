"""The tokens that titles are trained on: those that ART makes of them, with each prompt read once."""

from __future__ import annotations

import math
import random
from typing import Any

import art
import pytest
from art.preprocessing.tokenize import TokenizedResult, tokenize_trajectory_groups
from cpu_parts import ODD_TEXTS, choice, load_tokenizer
from gradient_parts import random_title

from tasks.engines.title_tokens import prompts_read_once
from tasks.titles.errors import ConfigError


def groups(bodies: tuple[str, ...], titles: int = 3) -> list[art.TrajectoryGroup]:
    rng = random.Random(3)
    made = [[random_title(rng, body) for _ in range(titles)] for body in bodies]
    return [
        art.TrajectoryGroup(
            [
                art.Trajectory(
                    messages_and_choices=[*title.messages, choice(title.tokens, title.logprobs)],  # type: ignore[list-item]
                    reward=title.reward,
                )
                for title in group
            ]
        )
        for group in made
    ]


def tokenized(tokenizer: Any, made: list[art.TrajectoryGroup]) -> list[TokenizedResult]:
    random.seed(1)
    return list(tokenize_trajectory_groups(tokenizer, made, False, True))


def told(result: TokenizedResult) -> dict[str, Any]:
    values = {name: value for name, value in vars(result).items() if name not in ("chat", "trajectory", "_tokenizer")}
    values["logprobs"] = [None if math.isnan(value) else value for value in result.logprobs]
    return values


def test_titles_have_the_tokens_that_art_gives_them() -> None:
    tokenizer, made = load_tokenizer(), groups((*ODD_TEXTS, ODD_TEXTS[0]))
    by_art = tokenized(tokenizer, made)
    with prompts_read_once():
        own = tokenized(tokenizer, made)
    assert len(own) == 3 * len(made)
    assert [told(result) for result in own] == [told(result) for result in by_art]
    assert [result.trajectory for result in own] == [result.trajectory for result in by_art]
    assert [result.chat for result in tokenized(tokenizer, made)] == [result.chat for result in by_art]


def test_a_prompt_is_read_once_for_all_of_its_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, made = load_tokenizer(), groups(("One body.", "Another.", "One body."))
    read: list[str] = []
    render = tokenizer.apply_chat_template

    def noted(messages: list[dict[str, str]], **options: Any) -> Any:
        read.append(messages[-1]["content"])
        return render(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", noted)
    with prompts_read_once():
        assert len(tokenized(tokenizer, made)) == 9
    assert read == ["One body.", "Another."]


def test_a_server_that_names_tokens_by_their_text_is_refused() -> None:
    (group,) = made = groups(("A body.",))
    group.trajectories[0].messages_and_choices[-1].logprobs.content[0].token = "The"  # type: ignore[union-attr]
    with prompts_read_once(), pytest.raises(ConfigError, match=r"token_id:17.*'The'.*return-tokens-as-token-ids"):
        tokenized(load_tokenizer(), made)
