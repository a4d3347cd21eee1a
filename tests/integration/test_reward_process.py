"""The reward server as a process: `python -m reward_server` and `RewardServerProcess`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from processes import is_alive, wait_until_gone

from reward_server.check import check_server
from reward_server.client import RewardClient
from reward_server.process import RewardServerProcess
from tasks.titles.errors import ServiceRejected, ServiceUnavailable

COMMAND = [sys.executable, "-m", "reward_server", "--threads", "1"]


async def test_a_started_server_passes_its_check_and_ends(tmp_path: Path) -> None:
    waited: list[float] = []
    server = RewardServerProcess(
        "starter", log_path=tmp_path / "logs" / "reward.log", threads=1, api_key="key", on_progress=waited.append
    )
    async with server:
        report = await check_server(server.url, "starter", api_key="key", measure_s=0.1)
        assert report.passed, report.results
        async with RewardClient(server.url) as client:
            with pytest.raises(ServiceRejected, match="401"):
                await client.health()
        pid = server.pid
        assert pid is not None
        assert os.getpgid(pid) == pid != os.getpgid(0)
    assert waited == sorted(waited) != []
    assert server.pid is None
    assert not is_alive(pid)
    log = (tmp_path / "logs" / "reward.log").read_text()
    assert "reads 2048 tokens" in log
    assert "Loading weights" not in log
    assert "Traceback" not in log
    assert "Application shutdown complete" in log


def test_a_model_that_cannot_be_loaded_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServiceUnavailable, match=r"exit code 2(.|\n)*No folder './nowhere'"),
        RewardServerProcess("./nowhere", log_path=tmp_path / "reward.log", threads=1),
    ):
        raise AssertionError("the server must not get ready")


def test_a_server_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    server = RewardServerProcess("starter", log_path=tmp_path / "reward.log", start_timeout_s=0.3)
    server.start()
    pid = server.pid
    assert pid is not None
    with pytest.raises(ServiceUnavailable, match=r"not ready after 0\.3 s"):
        server.wait_ready()
    server.stop()
    assert not is_alive(pid)
    server.stop()


def test_no_server_outlives_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from reward_server.process import RewardServerProcess\n"
        "server = RewardServerProcess('starter', log_path=Path(sys.argv[1]), threads=1)\n"
        "server.__enter__()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "reward.log"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    wait_until_gone(pid)
    parent.stdout.close()


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = RewardServerProcess("starter", log_path=tmp_path / "reward.log", threads=1)
    thread = threading.Thread(target=server.__enter__)
    thread.start()
    thread.join()
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    server.stop()


def test_ctrl_c_ends_it_cleanly() -> None:
    process = subprocess.Popen([*COMMAND, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "reads 2048 tokens" in line:
            break
    process.send_signal(signal.SIGINT)
    lines += process.stderr.readlines()
    process.stderr.close()
    assert process.wait(timeout=30) == 0
    output = "".join(lines)
    assert "Listening on http://127.0.0.1:" in output
    assert "Listening on http://127.0.0.1:0" not in output
    assert "Traceback" not in output


def test_a_taken_port_is_told_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith(f"Cannot listen on 127.0.0.1:{port}")
    assert len(result.stderr.splitlines()) == 1
