"""How fast a training is on this machine's GPU: `python -m bench.gpu --engine art|trl --base-model FOLDER`.

A step has 8 prompts of about 2,000 tokens and 6 titles of up to 100 tokens for each. Measured are this project's own
loop, without Prefect and MLflow; the engine alone (ART's bare example loop, its own training on the same service, or a
bare `GRPOTrainer`); and vLLM's offline throughput on prompts of the same steps, in a process of its own while nothing
else computes.
The base model may have random weights (`python -m bench.random_model`): the validator is asked, and its verdict is
taken for True. Figures are printed as they come; `--out` gets one entry for each engine and model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_measures import Measured
from bench.gpu_watch import GpuWatch
from tasks.engines.contract import TrainingRequest
from tasks.engines.resume import stored_state

BEGUN = time.monotonic()
OFFLINE_BATCHES = 4
SETTINGS = (
    "minimum_score=0",
    "reward_model=starter",
    # With a title they fit into the 2,048 tokens that ART pads every trajectory to.
    "max_prompt_tokens=1940",
    "max_completion_tokens=100",
    "group_size=6",
    "groups_per_step=8",
    "val_stories=4",
    "test_stories=1",
    "eval_steps=1000000",
    "max_empty_batches=20",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--engine", choices=["art", "trl"], required=True)
    parser.add_argument("--base-model", required=True, help="a folder or a hub name")
    parser.add_argument("--name", help="what to call the model in the table; unset: its folder's name")
    parser.add_argument("--profile", default="qwen-0.5b")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--stories", required=True, help="a .parquet or .jsonl file, or a hub data set's name")
    parser.add_argument("--reward-url", required=True, help="a reward server")
    parser.add_argument("--steps", type=int, default=8, help="of this project's loop; the first two are not counted")
    parser.add_argument("--bare-steps", type=int, default=2, help="of the engine alone, after its first ones; 0: none")
    parser.add_argument("--no-proof", action="store_true", help="do not compare a packed update with single passes")
    parser.add_argument("--no-offline", action="store_true", help="do not measure vLLM alone")
    parser.add_argument("--vllm", help="the command of a Python that has vLLM; unset: this one")
    parser.add_argument("--folder", type=Path, help="an empty one to work in and leave; unset: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("bench/gpu.json"))
    return parser.parse_args()


def say(*words: object) -> None:
    """Show a line at once: a run that is cut off has told what it measured."""
    sys.stdout.write(f"{time.monotonic() - BEGUN:7.1f} s  {' '.join(str(word) for word in words)}\n")
    sys.stdout.flush()


def take_every_verdict() -> None:
    """Ask the validator and take its answer for True: random weights know neither True nor False."""
    from tasks.titles.errors import UnreadableVerdict
    from tasks.titles.judges import Judges

    asked = Judges._verdict

    async def verdict(judges: Any, story: Any, title: str) -> bool:
        with contextlib.suppress(UnreadableVerdict):
            await asked(judges, story, title)
        return True

    Judges._verdict = verdict  # type: ignore[assignment, method-assign]


def make_request(asked: argparse.Namespace, folder: Path) -> TrainingRequest:
    from tasks.starter.paths import BASE_MODEL, resolve
    from tasks.titles.config import load_profile
    from tasks.titles.prepare import prepare_prompts

    overrides = [f"engine={asked.engine}", f"base_model={asked.base_model}", f"stories={asked.stories}", *SETTINGS]
    profile = load_profile(asked.profile, [*overrides, f"max_steps={asked.steps}", *asked.set])
    prompts = prepare_prompts(profile, cache_dir=folder / "cache")
    run_dir = folder / "run"
    run_dir.mkdir()
    return TrainingRequest(
        profile=profile,
        run_name="bench",
        run_dir=run_dir,
        base_model=resolve(profile.base_model, BASE_MODEL),
        train=prompts.train,
        val=prompts.val,
        reward_model_url=asked.reward_url,
    )


def offline(request: TrainingRequest, folder: Path, vllm: str | None) -> dict[str, Any]:
    """Return `gpu_offline`'s answer for the first prompts of the run, asked for what the engine's rollouts ask for.

    Both have the log-probability of each sampled token. ART's server computes with an adapter and draws each title
    from its own seed; TRL's vLLM has the adapter merged into the weights, log-probabilities after temperature, and no
    seeds.
    """
    from transformers import AutoTokenizer

    from tasks.engines.art_session import graph_sizes
    from tasks.engines.context import context_tokens
    from tasks.engines.resume import adapter_folder

    profile = request.profile
    state = stored_state(request.run_dir, profile.engine)
    adapter = adapter_folder(request.run_dir, "art", state.cursor.step) if profile.engine == "art" and state else None
    own: dict[str, Any] = {"logprobs_mode": "processed_logprobs"} if profile.engine == "trl" else {}
    if adapter:
        own = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}
    share = profile.art.vllm_memory_share if profile.engine == "art" else profile.trl.vllm_memory_share
    tokenizer = AutoTokenizer.from_pretrained(request.base_model)
    ids = [
        list(tokenizer.apply_chat_template(list(one.messages), add_generation_prompt=True, return_dict=False))
        for one in request.train[: OFFLINE_BATCHES * profile.groups_per_step]
    ]
    size = profile.groups_per_step
    titles = len(ids) * profile.group_size
    asked = {
        "model": request.base_model,
        "adapter": adapter and str(adapter),
        "engine": {
            "dtype": "bfloat16",
            "gpu_memory_utilization": share,
            "max_model_len": context_tokens(request.base_model, profile),
            "generation_config": "vllm",
            "compilation_config": {"cudagraph_capture_sizes": graph_sizes(titles)},
            **own,
        },
        "sampling": {
            "temperature": profile.temperature,
            "max_tokens": profile.max_completion_tokens,
            "logprobs": 0,
        },
        "seeded": profile.engine == "art",
        "batches": [
            [prompt for prompt in ids[start : start + size] for _ in range(profile.group_size)]
            for start in range(0, len(ids), size)
        ],
    }
    question, answer = folder / "asked.json", folder / "answer.json"
    question.write_text(json.dumps(asked), encoding="utf-8")
    script = Path(__file__).with_name("gpu_offline.py")
    command = [*shlex.split(vllm or sys.executable), "-P", str(script), str(question), str(answer)]
    with (folder / "offline.log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError((folder / "offline.log").read_text(encoding="utf-8", errors="replace")[-2000:])
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def entry(asked: argparse.Namespace, found: dict[str, Any], previous: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry of this engine and model: the keys of every entry first, then the details."""
    ours: Measured | None = found.get("ours")
    bare: Measured | None = found.get("bare")
    model = asked.name or Path(asked.base_model).name
    art_here = ("art", model, found["device"])
    of_art = next((one for one in previous if (one["engine"], one["model"], one["device"]) == art_here), None)
    rate = found.get("offline", {}).get("tokens_per_s")
    return {
        "engine": asked.engine,
        "model": model,
        "device": found["device"],
        "steps_per_hour": ours and ours.steps_per_hour,
        "bare_steps_per_hour": bare and bare.steps_per_hour,
        "rollout_tokens_per_s": ours and ours.rollout_tokens_per_s,
        "vllm_offline_tokens_per_s": rate and sorted(rate)[len(rate) // 2],
        "train_tokens_per_s": ours and ours.train_tokens_per_s,
        "gpu_busy": ours and ours.gpu_busy,
        "peak_memory_gb": ours and ours.peak_memory_gb,
        **({"art_bare_steps_per_hour": of_art["bare_steps_per_hour"]} if of_art and asked.engine == "trl" else {}),
        **{key: value.told() if isinstance(value, Measured) else value for key, value in found.items()},
    }


def write(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    """Put the entry into the file, in the place of an older one of this engine, model and device."""
    entries: list[dict[str, Any]] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else []
    own = entry(asked, found, entries)
    kept = [one for one in entries if any(one[key] != own[key] for key in ("engine", "model", "device"))]
    asked.out.write_text(json.dumps([*kept, own], indent=2) + "\n", encoding="utf-8")


def main() -> None:
    asked = arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore", "openai"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    device = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    take_every_verdict()
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as name, GpuWatch() as watch:
        folder = asked.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        request = make_request(asked, folder)
        say(
            f"{len(request.train)} prompts, {min(one.tokens for one in request.train)} to "
            f"{max(one.tokens for one in request.train)} tokens; {device}"
        )
        found: dict[str, Any] = {"device": device, "failed": {}}
        keep = partial(write, asked, found)
        alone = dict if asked.no_offline else partial(offline, request, folder, asked.vllm)
        try:
            if asked.engine == "art":
                from bench.gpu_art import measure_art

                options = {"steps": asked.steps, "bare_steps": asked.bare_steps, "prove": not asked.no_proof}
                asyncio.run(measure_art(request, found, watch, say, keep, measure_offline=alone, **options))
            else:
                from bench.gpu_trl import measure_trl

                options = {"steps": asked.steps, "bare_steps": asked.bare_steps}
                asyncio.run(measure_trl(request, found, watch, say, keep, measure_offline=alone, **options))
        except Exception as error:
            found["failed"]["run"] = f"{type(error).__name__}: {error}"
            say("FAILED:", found["failed"]["run"])
            keep()
    say("written to", asked.out)
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
