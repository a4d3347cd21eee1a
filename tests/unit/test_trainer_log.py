"""What TRL's trainer process writes, logged again where the flow runs."""

from __future__ import annotations

import logging

import pytest

from tasks.engines.trl_engine.launch import pass_on

LINES = [
    "2026-11-22 20:37:32,341 INFO tasks.engines.ledger: Step 0 of 60: validation reward 2.461",
    "2026-11-22 20:37:33,001 WARNING tasks.engines.ledger: The policy has collapsed",
    "{'loss': '-0.1477', 'reward': '2.338'}",
    "Traceback (most recent call last):",
]


def test_lines_keep_their_level_and_lose_their_second_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pass_on(LINES)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "tasks.engines.ledger: Step 0 of 60: validation reward 2.461"),
        (logging.WARNING, "tasks.engines.ledger: The policy has collapsed"),
        (logging.INFO, LINES[2]),
        (logging.INFO, LINES[3]),
    ]
    # Prefect hears of the loggers below "tasks".
    assert all(record.name.startswith("tasks.") for record in caplog.records)
