"""Proof that a running reward server does what it should: `hn-titles check-reward-server`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from reward_server.client import Health, RewardClient, RewardInput
from reward_server.encoding import text_of
from reward_server.model_files import ModelFiles, find_model
from reward_server.schemas import ScoreRequest
from reward_server.vllm_dialect import VLLM
from tasks.titles.errors import ServiceError

TOLERANCE = 0.01
"""Largest difference to the plain result, in log upvotes."""
_REPEAT_TOLERANCE = 1e-4
"""The same request twice may still meet other clients' texts in its batch, which moves the last digits."""
_IN_FLIGHT = 32
_BATCH_SIZE = 48

_SENTENCES = (
    "The team measured every release for eleven months before it published the figures.",
    "Its new storage engine writes 40% fewer bytes and survives a pulled power cord.",
    "Nobody had asked for a rewrite, and the old program went on running beside the new one.",
    "The price stays at $12 a month, the founders said on Tuesday.",
    "An early user in Oslo reported that the import of 3,000,000 rows took nine minutes.",
    "The source is open; the trained weights are not.",
)
_TITLES = (
    "A storage engine that survives a pulled power cord",
    "Show HN: we rewrote it, nobody asked",
    "Ünïcode: 標題 🚀",
)


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str
    """What was expected and what came."""


@dataclass(frozen=True)
class CheckReport:
    """What `check_server` found; the speeds are titles per second, None where it did not come to that."""

    url: str
    results: list[CheckResult] = field(default_factory=list)
    health: Health | None = None
    single_per_s: float | None = None
    """`POST /score`, 32 requests in flight."""
    batch_per_s: float | None = None
    """`POST /score/batch`, 48 titles a request, one request at a time."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.results) and all(result.passed for result in self.results)


def sample_inputs() -> list[RewardInput]:
    """Return a dozen titles whose bodies have between 1 and 23 sentences, the same ones in every call."""
    generator = random.Random(7)
    return [
        RewardInput(
            title=_TITLES[index % len(_TITLES)],
            scraped_body=" ".join(generator.choices(_SENTENCES, k=1 + 2 * index)),
            by=f"user{index}" if index % 2 else "",
            time=datetime(2024, 1, 1 + index, tzinfo=UTC) if index % 3 else None,
            url=f"https://example.org/{index}" if index % 4 else "",
        )
        for index in range(12)
    ]


async def check_server(
    url: str,
    model: str,
    *,
    api_key: str | None = None,
    tolerance: float = TOLERANCE,
    timeout_s: float = 60.0,
    measure_s: float = 5.0,
) -> CheckReport:
    """Check the reward server at `url`, which should run `model` ('starter', a folder or a hub name).

    It must be up, hold the same weights as `model` (left out for vLLM, which cannot tell), answer one request twice
    alike, alone and among others, and agree within `tolerance` (log upvotes) with transformers run plainly on one text
    at a time in float32 on this machine's CPU. Then its speed is measured for twice `measure_s` seconds. What fails is
    in the report; only a `model` that cannot be loaded here raises (`ConfigError`).
    """
    files = await asyncio.to_thread(find_model, model)
    inputs = sample_inputs()
    results: list[CheckResult] = []
    async with RewardClient(url, api_key=api_key, timeout_s=timeout_s) as client:
        try:
            health = await client.health()
            if health.device == VLLM:
                results.append(CheckResult("up", True, f"{health.model} on vLLM, which tells no weights to compare"))
            else:
                results.append(CheckResult("up", True, f"{health.model} on {health.device} in {health.dtype}"))
                results.append(await asyncio.to_thread(_same_weights, files, health))
            scores, result = await _check_repeatable(client, inputs, tolerance)
            results.append(result)
            plain = await asyncio.to_thread(plain_scores, files, inputs, health.max_length)
            differences = [abs(a - b) for a, b in zip(scores, plain, strict=True) if b is not None]
            difference = max(differences)
            detail = f"largest difference over {len(differences)} titles {difference:.2g}, {tolerance:g} allowed"
            if health.dtype != "float32":
                detail += f"; the server computes in {health.dtype} precision, --dtype float32 is exact"
            results.append(CheckResult("equal to transformers", difference <= tolerance, detail))
            single, batch = await _measure(client, inputs, measure_s)
        except ServiceError as error:
            results.append(CheckResult("answers" if results else "up", False, str(error)))
            return CheckReport(url, results)
    return CheckReport(url, results, health, single, batch)


def plain_scores(files: ModelFiles, inputs: Sequence[RewardInput], max_length: int) -> list[float | None]:
    """Return the scores by transformers alone: one text, one forward pass, no padding, adapter not merged.

    None stands for a text above `max_length` tokens, which the server would cut. Raises `ConfigError` where the model
    cannot be loaded.
    """
    import torch
    from transformers import AutoTokenizer

    from reward_server.scorer import load_classifier, silence_transformers

    silence_transformers()
    model = load_classifier(files, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer)
    scores: list[float | None] = []
    for item in inputs:
        encoded = tokenizer(text_of(ScoreRequest(**asdict(item))), return_tensors="pt")
        if encoded["input_ids"].shape[1] > max_length:
            scores.append(None)
            continue
        with torch.inference_mode():
            scores.append(float(model(**encoded).logits[0, 0]))
    return scores


def _same_weights(files: ModelFiles, health: Health) -> CheckResult:
    version = files.version()
    return CheckResult(
        "same weights",
        health.version == version,
        f"{files.name} has version {version}, the server runs {health.version}",
    )


async def _check_repeatable(
    client: RewardClient, inputs: Sequence[RewardInput], tolerance: float
) -> tuple[list[float], CheckResult]:
    """Return the score of each input asked alone, and whether asking again says the same."""
    first = [(await client.score(item)).score for item in inputs]
    again = [(await client.score(item)).score for item in inputs]
    whole = [answer.score for answer in await client.score_batch(inputs)]
    backwards = [answer.score for answer in await client.score_batch(inputs[::-1])][::-1]
    at_once = [answer.score for answer in await asyncio.gather(*(client.score(item) for item in inputs))]
    alone = max(abs(a - b) for a, b in zip(first, again, strict=True))
    together = max(abs(a - b) for other in (whole, backwards, at_once) for a, b in zip(first, other, strict=True))
    return first, CheckResult(
        "deterministic",
        alone <= _REPEAT_TOLERANCE and together <= tolerance,
        f"same request twice: {alone:.2g} ({_REPEAT_TOLERANCE:g} allowed), "
        f"in other batches: {together:.2g} ({tolerance:g} allowed)",
    )


async def _measure(client: RewardClient, inputs: Sequence[RewardInput], seconds: float) -> tuple[float, float]:
    """Return titles per second, asked singly and in batches, each for about `seconds`."""
    titles = [inputs[index % len(inputs)] for index in range(_BATCH_SIZE)]
    start = time.perf_counter()

    async def ask_singly(offset: int) -> int:
        asked = 0
        while time.perf_counter() - start < seconds:
            await client.score(titles[(offset + asked) % len(titles)])
            asked += 1
        return asked

    singles = sum(await asyncio.gather(*(ask_singly(offset) for offset in range(_IN_FLIGHT))))
    middle = time.perf_counter()
    batches = 0
    while not batches or time.perf_counter() - middle < seconds:
        await client.score_batch(titles)
        batches += 1
    end = time.perf_counter()
    return singles / (middle - start), batches * _BATCH_SIZE / (end - middle)
