"""Which GPUs trainer and vLLM get under TRL, and how a server of our own is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tasks.engines.trl_engine import vllm_server
from tasks.engines.trl_engine.arguments import trainer_environment
from tasks.engines.trl_engine.gpus import visible_gpus
from tasks.engines.trl_engine.vllm_server import open_vllm_server, server_command, server_environment
from tasks.titles.config import Profile, load_profile
from tasks.titles.errors import ConfigError, OutOfMemory, ServiceUnavailable

SERVER = ["trl.vllm_mode=server", "trl.server_gpus=[2]", "trl.trainer_gpus=[0]"]


def qwen(*overrides: str) -> Profile:
    return load_profile("qwen-0.5b", ["engine=trl", *overrides])


@pytest.mark.parametrize(
    ("shown", "ids", "expected"),
    [
        (None, (0,), "0"),
        (None, (3, 1), "3,1"),
        ("4,5,6,7", (0, 2), "4,6"),
        ("GPU-a, GPU-b", (1,), "GPU-b"),
    ],
)
def test_ids_count_the_gpus_that_are_shown(
    shown: str | None, ids: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_gpus(ids) == {"CUDA_VISIBLE_DEVICES": expected}


def test_a_gpu_that_is_not_shown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ConfigError, match="GPU 2, but CUDA_VISIBLE_DEVICES=4,5 shows 2"):
        server_environment(qwen(*SERVER))


def test_trainer_and_server_see_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5")
    profile = qwen(*SERVER)
    assert trainer_environment(profile)["CUDA_VISIBLE_DEVICES"] == "1"
    environment = server_environment(profile)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["VLLM_SERVER_DEV_MODE"]) == ("5", "1")
    assert "CUDA_VISIBLE_DEVICES" not in trainer_environment(qwen())


def test_the_server_is_started_as_trl_starts_it() -> None:
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    profile = qwen("trl.vllm_mode=server", "trl.server_gpus=[1,2]", "trl.trainer_gpus=[0]", "trl.vllm_memory_share=0.8")
    command = server_command(profile, "a model", 4321)
    assert command[:5] == [sys.executable, "-m", vllm_server.PROCESS, "serve", "a model"]
    own = dict(zip(command[5::2], command[6::2], strict=True))
    theirs = build_command(ScriptArguments(model="a model"))
    # What TRL cannot do without, in its own words.
    for flag in ("--weight-transfer-config", "--logprobs-mode", "--max-logprobs"):
        assert own[flag] == theirs[theirs.index(flag) + 1]
    assert json.loads(own["--weight-transfer-config"]) == {"backend": "nccl"}
    assert (own["--host"], own["--port"], own["--tensor-parallel-size"]) == ("127.0.0.1", "4321", "2")
    assert (own["--gpu-memory-utilization"], own["--max-model-len"]) == ("0.8", "8192")
    assert own["--max-num-seqs"] == str(profile.groups_per_step * profile.group_size)


@pytest.mark.parametrize(
    ("overrides", "address"),
    [
        (["device=cpu"], None),
        ([], None),
        (["trl.vllm_mode=server"], "http://there:8000"),
    ],
)
async def test_no_server_is_started_where_none_is_ours(
    overrides: list[str], address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_URL", "http://there:8000")
    async with open_vllm_server(qwen(*overrides), "model", tmp_path) as url:
        assert url == address
    assert not list(tmp_path.iterdir())


HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


async def test_a_server_of_ours_is_waited_for_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small HTTP server in the place of vLLM."""
    import httpx

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        vllm_server, "server_command", lambda _, __, port, ___: [sys.executable, "-c", HEALTHY, str(port)]
    )
    async with open_vllm_server(qwen(*SERVER), "model", tmp_path) as url:
        assert url is not None
        assert httpx.get(f"{url}/health").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


async def test_a_server_that_does_not_start_is_told_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command, where vLLM is not installed or finds no such model."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ServiceUnavailable, match=r"(?s)ended with exit code 1 before it was ready.*vllm\.log"):
        async with open_vllm_server(qwen(*SERVER), str(tmp_path / "no model"), tmp_path):
            pass


async def test_a_server_without_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM's last words in the place of vLLM."""
    reason = "(EngineCore pid=71) ERROR [core.py:1136] ValueError: No available memory for the cache blocks."
    says = f"import sys; sys.exit({reason!r} + '\\n(APIServer) in a long traceback' * 40)"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(vllm_server, "server_command", lambda *_: [sys.executable, "-c", says])
    with pytest.raises(OutOfMemory, match=r"(?s)cache blocks.*ended with exit code 1 before it was ready.*vllm\.log"):
        async with open_vllm_server(qwen(*SERVER), "model", tmp_path):
            pass
