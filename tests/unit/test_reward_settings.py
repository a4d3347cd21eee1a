"""Where the reward server's settings come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reward_server.settings import read_settings
from tasks.titles.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REWARD_SERVER_API_KEY", raising=False)


def test_defaults() -> None:
    settings = read_settings([])
    assert (settings.host, settings.port, settings.model, settings.api_key) == ("127.0.0.1", 7000, "starter", None)


def test_flags_outrank_the_environment_and_the_environment_outranks_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "REWARD_SERVER_PORT=1\nREWARD_SERVER_THREADS=3\nREWARD_SERVER_API_KEY=file\nOTHER=x\n"
    )
    monkeypatch.setenv("REWARD_SERVER_PORT", "2")
    monkeypatch.setenv("REWARD_SERVER_MAX_LENGTH", "99")
    settings = read_settings(["--port", "3"])
    assert (settings.port, settings.threads, settings.max_length) == (3, 3, 99)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "file"
    assert "file" not in repr(settings)
    monkeypatch.setenv("REWARD_SERVER_API_KEY", "")
    assert read_settings([]).api_key is None


def test_prefix_sharing_is_on_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings([]).prefix_sharing
    assert not read_settings(["--no-prefix-sharing"]).prefix_sharing
    monkeypatch.setenv("REWARD_SERVER_PREFIX_SHARING", "0")
    assert not read_settings([]).prefix_sharing
    assert read_settings(["--prefix-sharing"]).prefix_sharing


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_SERVER_QUEUE_SIZE", "3")
    with pytest.raises(ConfigError, match="queue_size"):
        read_settings([])


def test_an_unknown_flag_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--prot", "1"])
    assert ended.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_help_settings_and_client_load_no_torch() -> None:
    code = (
        "import sys, reward_server.__main__, reward_server.client, reward_server.process, reward_server.check\n"
        "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
