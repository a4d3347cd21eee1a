"""Unsloth's trainer may have asked its model for hidden states; the validator and the canary want logits."""

from __future__ import annotations

import os

import pytest

from tasks.engines.trl_engine.validator import HIDDEN_STATES, plain_logits


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_logits_are_asked_for_and_the_trainer_finds_its_own_wish_again(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(HIDDEN_STATES, raising=False)
    if asked is not None:
        monkeypatch.setenv(HIDDEN_STATES, asked)
    with pytest.raises(ValueError), plain_logits():
        assert os.environ[HIDDEN_STATES] == "0"
        raise ValueError
    assert os.environ.get(HIDDEN_STATES) == asked
