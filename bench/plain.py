"""What the reward server is compared with: a server with one forward pass a title, and the limit without any HTTP.

`python -m bench.plain --model MODEL --fd N` serves on an inherited socket.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoTokenizer

from reward_server.encoding import text_of
from reward_server.model_files import find_model
from reward_server.schemas import ScoreAnswer, ScoreRequest
from reward_server.scorer import load_classifier, prepare_device, silence_transformers
from tasks.titles.child_process import end_with_stdin


class PlainScorer:
    """The classifier as transformers runs it; an adapter is merged."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        """Load it in `dtype`, with the reward server's own attention."""
        silence_transformers()
        prepare_device(device)
        files = find_model(model)
        classifier = load_classifier(files, getattr(torch, dtype))
        self._model: Any = classifier.merge_and_unload() if files.adapter is not None else classifier
        self._model.to(device)
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(files.tokenizer)
        if self._model.config.pad_token_id is None:
            self._model.config.pad_token_id = self._tokenizer.pad_token_id

    @torch.inference_mode()
    def scores(self, texts: Sequence[str]) -> list[float]:
        """Return the scores of `texts` from one forward pass."""
        batch = self._tokenizer(list(texts), padding=True, return_tensors="pt").to(self._device)
        logits = self._model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return logits[:, 0].float().tolist()

    def sorted_scores(self, texts: Sequence[str], batch_size: int) -> tuple[list[float], float]:
        """Return the score of each of `texts`, computed in batches of like length, and the seconds that took."""
        start = time.perf_counter()
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = [0.0] * len(texts)
        for place in range(0, len(order), batch_size):
            chosen = order[place : place + batch_size]
            for index, score in zip(chosen, self.scores([texts[index] for index in chosen]), strict=True):
                scores[index] = score
        return scores, time.perf_counter() - start


def plain_app(scorer: PlainScorer) -> FastAPI:
    """Return a server that makes one forward pass for each title, when it comes."""
    app = FastAPI()

    @app.post("/score")
    async def score(body: ScoreRequest) -> ScoreAnswer:
        return ScoreAnswer(score=scorer.scores([text_of(body)])[0], version="plain")

    @app.post("/score/batch")
    async def score_batch(body: list[ScoreRequest]) -> list[ScoreAnswer]:
        return [await score(item) for item in body]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    end_with_stdin()
    app = plain_app(PlainScorer(arguments.model, arguments.device, arguments.dtype))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=600)
    with socket.socket(fileno=arguments.fd) as listener:
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
