"""vLLM's pooling runner as a reward server: `vllm serve FOLDER --runner pooling`, asked through `POST /classify`.

vLLM reads whole texts, so they are put together here. It takes special tokens that a text spells out for such, which
this project's server does not; for models of the `<|token|>` kind nothing more is needed, `neutralise` has broken them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import ValidationError

from reward_server.dialects import Ask, Health, RewardInput, Score, is_finite_number
from reward_server.encoding import text_of
from reward_server.schemas import ScoreRequest
from tasks.titles.errors import ServiceRejected

VLLM = "vllm"
"""What `Health.device` says of a vLLM server, which tells neither its device nor its weights."""
_BAD_REQUEST = 400
"""Also vLLM's answer to a text that is too long, in words that its versions change."""
_FULL = 0.95
"""Share of vLLM's limit that a text which was cut should have."""
_ATTEMPTS = 10
"""Most lengths that are tried for it; an ordinary article takes one."""
_TINY = RewardInput(title="A title", scraped_body="A body.")


@dataclass(frozen=True, slots=True)
class _Served:
    """The model that `GET /v1/models` names first: the one that was given to `vllm serve`."""

    name: str
    version: str
    max_length: int
    """Tokens of one text; a pooling model needs none of them for its output."""


class VllmDialect:
    """A vLLM server of a classifier with one output."""

    def __init__(self, ask: Ask, address: str) -> None:
        """`address` is for messages."""
        self._ask = ask
        self._address = address
        self._served: _Served | None = None

    async def score(self, item: RewardInput) -> Score:
        [score] = await self.score_batch([item])
        return score

    async def score_batch(self, items: Sequence[RewardInput]) -> list[Score]:
        requests = [_checked(item) for item in items]
        served = self._served or await self._ask_served()
        texts = [text_of(request) for request in requests]
        try:
            values = await self._classify(served, texts)
        except ServiceRejected as rejected:
            if rejected.status != _BAD_REQUEST:
                raise
            fitting = list(await asyncio.gather(*(self._fitting(served, request) for request in requests)))
            if fitting == texts:
                raise
            values = await self._classify(served, fitting)
        return [Score(value, served.version) for value in values]

    async def health(self) -> Health:
        served = await self._ask_served()
        return Health(
            model=served.name,
            version=served.version,
            device=VLLM,
            dtype="unknown",
            max_length=served.max_length,
            score=(await self.score(_TINY)).score,
            waiting=0,
        )

    async def _ask_served(self) -> _Served:
        answer = await self._ask("GET", "/v1/models", None)
        try:
            card = answer["data"][0]
            name, max_length = card["id"], card["max_model_len"]
            if not isinstance(name, str) or not isinstance(max_length, int):
                raise ValueError("no id or max_model_len")
            version = f"{VLLM}:{card.get('root') or name}"
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServiceRejected(
                f"Expected a model with id and max_model_len from {self._address}/v1/models, got {answer!r:.300}"
            ) from error
        self._served = _Served(name, version, max_length)
        return self._served

    async def _classify(self, served: _Served, texts: Sequence[str]) -> list[float]:
        # Without its activation, which for one output may be a sigmoid, the score is the model's own: log upvotes.
        payload = {"model": served.name, "input": texts, "use_activation": False}
        answer = await self._ask("POST", "/classify", payload)
        try:
            entries = sorted(answer["data"], key=lambda entry: entry["index"])
            if [entry["index"] for entry in entries] != list(range(len(texts))):
                raise ValueError("an index is missing or comes twice")
            values = [value for entry in entries for [value] in [entry["probs"]]]
            if not all(map(is_finite_number, values)):
                raise ValueError("a score is no finite number")
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceRejected(
                f"Expected one finite number for each of {len(texts)} texts from {self._address}/classify ({error!r}); "
                f"the model served must be a classifier with one output. Got {answer!r:.300}"
            ) from error
        return [float(value) for value in values]

    async def _fitting(self, served: _Served, request: ScoreRequest) -> str:
        """Return the text of `request`, without as much of its body's end as vLLM would refuse to read."""
        limit, body = served.max_length, request.scraped_body
        text = text_of(request)
        if len(text.encode()) <= limit:  # a token stands for one byte at least
            return text
        too_many = await self._count_tokens(served, text)
        if too_many <= limit:
            return text

        def cut(kept: int) -> str:
            return text_of(request.model_copy(update={"scraped_body": body[:kept]}))

        kept, count = 0, await self._count_tokens(served, cut(0))
        if count > limit:
            raise ServiceRejected(
                f"Title, URL and submitter alone are longer than the {limit} tokens that {self._address} reads."
            )
        too_long = len(body)
        for attempt in range(_ATTEMPTS):
            if count >= _FULL * limit or too_long - kept <= 1:
                break
            # By the share of the tokens, and by half in between: blank space has many characters a token, Chinese few.
            share = ((1 + _FULL) / 2 * limit - count) / (too_many - count) if attempt % 2 == 0 else 0.5
            middle = kept + max(1, int(share * (too_long - kept)))
            tokens = await self._count_tokens(served, cut(middle))
            if tokens <= limit:
                kept, count = middle, tokens
            else:
                too_long, too_many = middle, tokens
        return cut(kept)

    async def _count_tokens(self, served: _Served, text: str) -> int:
        answer = await self._ask("POST", "/tokenize", {"model": served.name, "prompt": text})
        count = answer.get("count") if isinstance(answer, dict) else None
        if not isinstance(count, int):
            raise ServiceRejected(f"Expected {{'count': tokens}} from {self._address}/tokenize, got {answer!r:.200}")
        return count


def _checked(item: RewardInput) -> ScoreRequest:
    """Return `item` as this project's server would read it; vLLM has no rules for it."""
    try:
        return ScoreRequest(**asdict(item))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ServiceRejected(f"The title cannot be scored: {'; '.join(problems)}") from error
