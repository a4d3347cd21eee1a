"""What vLLM 0.22 answers as a pooling server of the starter reward model: its shapes and errors, and real scores."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from serving import starter_scorer
from starlette.responses import Response
from transformers import AutoTokenizer

from reward_server.model_files import find_model

NAME = "served"
ROOT = "/models/merged"


class VllmDouble:
    """The application in `app`; what was asked is kept in `asked`, and `answers` go out first, one a request."""

    def __init__(self, max_model_len: int = 2048, api_key: str | None = None) -> None:
        self.max_model_len = max_model_len
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, list[Response]] = {}
        """By path: answers in place of vLLM's own."""
        self._key = api_key
        self._tokenizer = AutoTokenizer.from_pretrained(find_model("starter").tokenizer)
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        self.app = FastAPI()
        self.app.middleware("http")(self._first)
        self.app.get("/v1/models")(self._models)
        self.app.post("/classify")(self._classify)
        self.app.post("/tokenize")(self._tokenize)

    def texts(self) -> list[list[str]]:
        """Return the texts of each request to classify."""
        return [body["input"] for path, body in self.asked if path == "/classify"]

    def tokens(self, text: str) -> list[int]:
        """Return the tokens that vLLM reads; a special token in `text` is one."""
        return self._tokenizer(text)["input_ids"]

    async def _first(self, request: Request, call_next: Any) -> Response:
        path = request.url.path
        self.asked.append((path, await request.json() if request.method == "POST" else None))
        # vLLM asks for the key below /v1 only.
        if self._key and path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {self._key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if self.answers.get(path):
            return self.answers[path].pop(0)
        return await call_next(request)

    async def _models(self) -> Any:
        card = {"id": NAME, "object": "model", "owned_by": "vllm", "root": ROOT, "parent": None}
        return {"object": "list", "data": [{**card, "max_model_len": self.max_model_len, "permission": []}]}

    async def _tokenize(self, body: dict[str, Any]) -> Any:
        ids = self.tokens(body["prompt"])
        return {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": None}

    async def _classify(self, body: dict[str, Any]) -> Any:
        if body["model"] != NAME:
            return _error(404, "NotFoundError", f"The model `{body['model']}` does not exist.", None)
        limit = self.max_model_len
        head = (
            f"This model's maximum context length is {limit} tokens. However, you requested 0 output tokens and your "
        )
        tail = " Please reduce the length of the input prompt or the number of requested output tokens."
        texts = [(text, self.tokens(text)) for text in body["input"]]
        for text, ids in texts:
            if len(text) > limit * self._longest_token:
                problem = (
                    f"your prompt contains {len(text)} characters (more than {limit * self._longest_token} characters, "
                    f"which is the upper bound for {limit} input tokens).{tail}"
                )
                problem += f" (parameter=input_text, value={len(text)})"
                return _error(400, "BadRequestError", head + problem, "input_text")
            if len(ids) > limit:
                count = f"at least {limit + 1}"  # vLLM's tokenizer stops there
                problem = f"your prompt contains {count} input tokens, for a total of {count} tokens.{tail}"
                problem += f" (parameter=input_tokens, value={limit + 1})"
                return _error(400, "BadRequestError", head + problem, "input_tokens")
        scores = await asyncio.to_thread(starter_scorer().score_tokens, [ids for _, ids in texts])
        assert body["use_activation"] is False, "the scores below have seen no sigmoid"
        return classification([[score] for score in scores])


def classification(probs: list[list[Any]]) -> dict[str, Any]:
    """Return the answer of `POST /classify` with these outputs, one list per text."""
    entries = [
        {"index": index, "label": "LABEL_0", "probs": values, "num_classes": len(values)}
        for index, values in enumerate(probs)
    ]
    usage = {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": "classify-1", "object": "list", "created": 1, "model": NAME, "data": entries, "usage": usage}


def _error(status: int, kind: str, message: str, param: str | None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)
