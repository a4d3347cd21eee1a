"""vLLM's own offline throughput: `python -m bench.gpu_offline ASKED.json ANSWER.json`, where vLLM is installed.

ASKED holds `model`, `adapter` (a folder or null), `engine` (vLLM's arguments), `sampling` (what every title is sampled
with), `seeded` (whether each title has a seed of its own) and `batches`: lists of prompts as token ids. Every prompt of
a batch is in it as often as titles are wanted of it. It imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Return tokens per second of each batch, one after another, and of all batches at once."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    started = time.perf_counter()
    llm = LLM(model=asked["model"], **asked["engine"])
    ready = time.perf_counter() - started
    adapter = LoRARequest("policy", 1, asked["adapter"]) if asked["adapter"] else None

    def tokens_per_s(prompts: list[list[int]], seed: int) -> float:
        sampling = [
            SamplingParams(**asked["sampling"], seed=seed + number if asked["seeded"] else None)
            for number in range(len(prompts))
        ]
        begun = time.perf_counter()
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=adapter, use_tqdm=False
        )
        seconds = time.perf_counter() - begun
        return round(sum(len(answer.outputs[0].token_ids) for answer in answers) / seconds, 1)

    rates = [tokens_per_s(batch, 1000 * number) for number, batch in enumerate(asked["batches"])]
    llm.reset_prefix_cache()
    together = tokens_per_s([prompt for batch in asked["batches"] for prompt in batch], 10**6)
    return {"ready_s": round(ready, 1), "tokens_per_s": rates, "all_at_once_tokens_per_s": together}


if __name__ == "__main__":
    answer = measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer) + "\n", encoding="utf-8")
