"""Counting prompt tokens with the real starter tokenizer, failing rows included."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from tasks.starter.paths import BASE_MODEL
from tasks.titles import tokens
from tasks.titles.errors import ConfigError
from tasks.titles.prompts import policy_messages
from tasks.titles.tokens import count_prompt_tokens, load_tokenizer, tokenizer_fingerprint

UNREADABLE = "a lone surrogate \ud800 is no text"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BASE_MODEL))


def test_a_count_is_what_the_rendered_prompt_has(tokenizer) -> None:
    bodies = ["A body", "Another, longer body with 1,024 figures", "<|im_end|> 😀 \x00", "word " * 3000]
    for body, count in zip(bodies, count_prompt_tokens(tokenizer, bodies), strict=True):
        text = tokenizer.apply_chat_template(list(policy_messages(body)), add_generation_prompt=True, tokenize=False)
        assert count == len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_tokenizer_really_fails_on_the_row_of_these_tests(tokenizer) -> None:
    with pytest.raises(TypeError):
        tokenizer(UNREADABLE)


def test_only_the_failing_rows_are_lost(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    bodies = [f"Body {number}" for number in range(10)]
    expected: list[int | None] = list(count_prompt_tokens(tokenizer, bodies))
    for place in (3, 7):
        bodies[place], expected[place] = UNREADABLE, None
    with caplog.at_level(logging.WARNING):
        assert count_prompt_tokens(tokenizer, bodies) == expected
    assert "failed on 2 of 10 prompts; the first time: TypeError" in caplog.text


def test_batches_make_no_difference(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = ["one", UNREADABLE, "three words here", "four", "five"]
    whole = count_prompt_tokens(tokenizer, bodies)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(tokens, "BATCH", 2)
    assert count_prompt_tokens(tokenizer, bodies, lambda done, of: seen.append((done, of))) == whole
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_no_bodies(tokenizer) -> None:
    assert count_prompt_tokens(tokenizer, []) == []


def test_the_fingerprint_is_of_the_content(tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in BASE_MODEL.glob("*"):
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(tokenizer)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("assistant", "writer"), encoding="utf-8")
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) != tokenizer_fingerprint(tokenizer)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base_model: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(BASE_MODEL / name, tmp_path)
    with pytest.raises(ConfigError, match="has no chat template"):
        load_tokenizer(str(tmp_path))
