"""What ART starts in the place of vLLM's server where there is no GPU: two processes, and no model in them.

    python vllm_process_double.py --port=PORT ...   with all other options of ART's `dedicated_server`

A request for a title is never answered. Loading adapter 9 fails. With VLLM_DOUBLE_FULL set the engine does not start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

ENGINE = "import time; time.sleep(600)  # vLLM's engine"
# Two lines of vLLM 0.22.1 that name errors and mean none.
WARNINGS = (
    "(APIServer pid=1) WARNING 11-23 15:20:15 [system_utils.py:299] Found ulimit of 20000. This can cause fd limit "
    "errors like `OSError: [Errno 24] Too many open files`. Consider increasing with ulimit -n\n"
    "(EngineCore pid=2) [rank0]:W1123 15:31:02.743000 2 torch/_inductor/remote_cache.py:372] RuntimeError: redis not "
    "available but required for remote cache\n"
)
FULL = "ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired"


def build_app() -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    @app.post("/sleep")
    @app.post("/wake_up")
    async def fine() -> dict[str, str]:
        return {"status": "fine"}

    @app.get("/v1/models")
    async def models() -> dict[str, list[str]]:
        return {"data": []}

    @app.post("/v1/load_lora_adapter")
    async def load(body: dict[str, object]) -> Response:
        wrong = str(body["lora_name"]).endswith("@9")
        return JSONResponse({"error": "no such adapter"} if wrong else {}, 500 if wrong else 200)

    @app.post("/v1/chat/completions")
    async def write() -> None:
        await asyncio.sleep(600)

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    options, _ = parser.parse_known_args()
    if os.environ.get("VLLM_DOUBLE_FULL"):
        sys.exit(f"{WARNINGS}(EngineCore) ERROR {FULL}\n" + "(APIServer) in a long traceback\n" * 30)
    # In the server's process group, as vLLM's own engine is.
    subprocess.Popen([sys.executable, "-c", ENGINE])
    uvicorn.run(build_app(), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
