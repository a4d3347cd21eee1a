"""How fast the reward server is: `python -m bench.reward_server`, or `make bench`.

In one run, in changing order over several rounds, the same titles go to
  ours          the reward server without prefix sharing,
  ours_prefix   the reward server as it is by default,
  plain         a server that makes one forward pass for each title,
  limit         no server: one loop over batches of like length, of the best batch size, in this process.
Loads, for bodies of several lengths: `titles` (each title in its own request, from 1, 8 and 64 clients) and the 8 x 6
titles of a training step at once, then those of the next step: `burst` (48 requests), `step` (as ART's loop sends them:
through the client, which joins them) and `batch` (one request, as TRL's reward function sends them). Rates are
titles per second, medians over the rounds; latencies are those of ours_prefix, and max_abs_diff is its largest
difference to plain. The result is a table and bench/reward_server.json.

`--requests N` does something else: it sends N titles of short bodies and fails where the server's memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from bench.load import (
    STORIES,
    TITLES,
    Answers,
    Stories,
    Title,
    send_joined,
    send_singly,
    send_steps,
    send_together,
)
from bench.plain import PlainScorer
from bench.random_model import random_qwen
from reward_server.encoding import text_of
from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from tasks.titles.child_process import ChildProcess

RESULT = Path(__file__).with_suffix(".json")
BODY_TOKENS = {"starter": (200, 600, 1800), "qwen-0.5b": (200, 2000, 8000)}
QUICK_BODY_TOKENS = {"starter": (200,), "qwen-0.5b": (200, 2000)}
BATCH_SIZES = {"cpu": (1, 4, 16), "cuda": (1, 4, 16, 48)}
CLIENTS = (1, 8, 64)
KINDS = ("titles", "burst", "step", "batch")
SERVERS = ("ours", "ours_prefix", "plain")
WARM_UP_S = {"plain": 0.0, "ours": 3.0, "ours_prefix": 3.0}
"""A load is sent for so long, at least once, before it counts: on a GPU passes of one shape are fast from the third
time on."""
TABLE_WIDTH = 160
MEMORY_BODY_TOKENS = 30
MEMORY_SHARE = 0.03
"""Growth of the server's memory that is still called flat, from the second quarter of the requests to the last."""


@dataclass(frozen=True)
class Load:
    """One way to send titles."""

    kind: str
    body_tokens: int
    clients: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.kind} body={self.body_tokens}"

    @property
    def least_steps(self) -> int:
        """Training steps whose titles keep all clients busy most of the time."""
        return math.ceil(3 * self.clients / (STORIES * TITLES)) if self.kind == "titles" else 1

    async def send(self, url: str, titles: list[Title]) -> Answers:
        """Send `titles` to the server at `url`."""
        if self.kind == "titles":
            return await send_singly(url, titles, self.clients)
        send: dict[str, Callable[[Sequence[Title]], Awaitable[Answers]]] = {
            "burst": lambda step: send_singly(url, step, self.clients),
            "step": lambda step: send_joined(url, step),
            "batch": lambda step: send_together(url, step),
        }
        return await send_steps(titles, send[self.kind])


@dataclass
class Measured:
    """What the rounds of one load gave."""

    rates: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*SERVERS, "limit")})
    latencies: list[float] = field(default_factory=list)
    max_abs_diff: float = 0.0


@dataclass(frozen=True)
class Row:
    """One entry of the result."""

    name: str
    device: str
    clients: int
    ours_rps: float
    plain_rps: float
    limit_rps: float
    ours_prefix_rps: float
    p50_ms: float
    p99_ms: float
    max_abs_diff: float


@contextlib.contextmanager
def server(name: str, model: str, options: argparse.Namespace, logs: Path) -> Iterator[tuple[str, ChildProcess]]:
    """Run one of `SERVERS`; yield its address and process at once (`wait_ready` waits until it answers)."""
    command = [sys.executable, "-m", "bench.plain" if name == "plain" else "reward_server"]
    command += ["--model", model, "--device", options.device, "--dtype", options.dtype]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("REWARD_SERVER_")}
    environment["REWARD_SERVER_API_KEY"] = ""  # outranks a key in `.env`
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if name != "plain":
        command += ["--stop-with-stdin", "--max-length", "32768"]
        command += ["--prefix-sharing" if name == "ours_prefix" else "--no-prefix-sharing"]
    log = logs / f"{name}.log"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command += ["--fd", str(listener.fileno())]
        process = ChildProcess(command, log_path=log, environment=environment, pass_fds=(listener.fileno(),))
    try:
        yield url, process
    finally:
        process.stop()


def wait_ready(url: str, process: ChildProcess) -> None:
    """Return once the server at `url` answers. Raises `RuntimeError` where it ends before."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/health").status_code == 200:
                    return
            time.sleep(0.2)
    raise RuntimeError(f"The server at {url} did not start.{process.log_end()}")


def best_batch_size(scorer: PlainScorer, texts: list[str], sizes: tuple[int, ...]) -> int:
    """Return which of `sizes` is the fastest on `texts`."""
    scorer.sorted_scores(texts[:2], 1)
    seconds: dict[int, float] = {}
    for size in sizes:
        try:
            seconds[size] = scorer.sorted_scores(texts, size)[1]
        except torch.OutOfMemoryError:
            break
    return min(seconds, key=lambda size: seconds[size])


def measure(options: argparse.Namespace, model: str, urls: dict[str, str], console: Console) -> list[Row]:
    """Return a row for each load; unless the bench is a quick one, `--out` holds those measured so far."""
    scorer = PlainScorer(model, options.device, options.dtype)
    stories = Stories(AutoTokenizer.from_pretrained(find_model(model).tokenizer))
    device = f"{torch.cuda.get_device_name() if options.device == 'cuda' else 'cpu'}, {options.dtype}"
    lengths = options.body_tokens or (QUICK_BODY_TOKENS if options.quick else BODY_TOKENS)[options.model_size]
    rows = []
    for body_tokens in lengths:
        titles = stories.steps(1, body_tokens)
        size = best_batch_size(scorer, texts_of(titles), BATCH_SIZES[options.device])
        console.print(f"bodies of {body_tokens} tokens: the limit's best batch size is {size}")
        loads = [Load("titles", body_tokens, clients) for clients in CLIENTS]
        loads += [Load("burst", body_tokens, 48), Load("step", body_tokens, 1), Load("batch", body_tokens, 1)]
        for load in [load for load in loads if load.kind in options.kinds]:
            measured = asyncio.run(measure_load(load, options, stories, scorer, size, urls))
            rows.append(row_of(load, device, measured))
            if not options.quick:
                write(rows, options.out)
            row = rows[-1]
            rates = f"plain {row.plain_rps}, limit {row.limit_rps}, ours {row.ours_rps}, prefix {row.ours_prefix_rps}"
            console.print(f"{row.name}, {row.clients} clients: {rates}")
    return rows


async def measure_load(
    load: Load,
    options: argparse.Namespace,
    stories: Stories,
    scorer: PlainScorer,
    batch_size: int,
    urls: dict[str, str],
) -> Measured:
    """Send fresh stories to everyone in turns, for several rounds."""
    measured = Measured()
    steps = max(options.steps, load.least_steps)
    for name, seconds in WARM_UP_S.items():
        end = time.monotonic() + seconds
        while True:
            await load.send(urls[name], stories.steps(steps, load.body_tokens))
            if time.monotonic() >= end:
                break
    for number in range(options.rounds):
        titles = stories.steps(steps, load.body_tokens)
        turn = number % len(SERVERS)
        answers = {name: await load.send(urls[name], titles) for name in (*SERVERS[turn:], *SERVERS[:turn])}
        for name, answer in answers.items():
            measured.rates[name].append(answer.per_second)
        _, seconds = scorer.sorted_scores(texts_of(titles), batch_size)
        measured.rates["limit"].append(len(titles) / seconds)
        measured.latencies += answers["ours_prefix"].latencies
        pairs = zip(answers["ours_prefix"].scores, answers["plain"].scores, strict=True)
        measured.max_abs_diff = max(measured.max_abs_diff, *(abs(ours - plain) for ours, plain in pairs))
    return measured


def write(rows: list[Row], path: Path) -> None:
    """Put `rows` into the JSON file at `path` in place of what it holds of the same loads."""
    loads = json.loads(path.read_text(encoding="utf-8"))["loads"] if path.exists() else []
    measured = {(row.name, row.device, row.clients) for row in rows}
    kept = [load for load in loads if (load["name"], load["device"], load["clients"]) not in measured]
    loads = sorted(kept + [asdict(row) for row in rows], key=lambda load: load["device"])
    path.write_text(json.dumps({"loads": loads}, indent=2) + "\n", encoding="utf-8")


def texts_of(titles: list[Title]) -> list[str]:
    """Return what the model reads for each title."""
    return [text_of(ScoreRequest.model_validate(title)) for title in titles]


def row_of(load: Load, device: str, measured: Measured) -> Row:
    """Return the medians of what was measured."""
    rates = {f"{name}_rps": round(statistics.median(values), 2) for name, values in measured.rates.items()}
    latencies = sorted(measured.latencies)
    p50, p99 = (latencies[round(share * (len(latencies) - 1))] * 1000 for share in (0.5, 0.99))
    return Row(
        name=load.name,
        device=device,
        clients=load.clients,
        p50_ms=round(p50, 1),
        p99_ms=round(p99, 1),
        max_abs_diff=float(f"{measured.max_abs_diff:.3g}"),
        **rates,
    )


def table_of(rows: list[Row]) -> Table:
    """Return the rows as people read them, with the ratios that count."""
    table = Table(title=f"Reward server on {rows[0].device}, titles per second")
    for heading in ("load", "clients", "plain", "limit", "ours", "ours, prefix"):
        table.add_column(heading, justify="left" if heading == "load" else "right")
    for heading in ("ours/plain", "ours/limit", "prefix/plain", "prefix/limit", "p50 ms", "p99 ms", "max diff"):
        table.add_column(heading, justify="right")
    for row in rows:
        rates = (row.plain_rps, row.limit_rps, row.ours_rps, row.ours_prefix_rps)
        ratios = [ours / other for ours in rates[2:] for other in rates[:2]]
        table.add_row(
            row.name, str(row.clients), *(f"{rate:.1f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios),
            f"{row.p50_ms:.0f}", f"{row.p99_ms:.0f}", f"{row.max_abs_diff:.2g}",
        )  # fmt: skip
    return table


async def memory_is_flat(url: str, pid: int, requests: int, stories: Stories, console: Console) -> bool:
    """Send `requests` titles from 64 clients and say whether the server's memory stays what it is."""
    process = psutil.Process(pid)
    sizes: list[int] = []
    part = max(requests // 20, 1)
    start = time.perf_counter()
    for number in range(20):
        titles: list[Title] = []
        while len(titles) < part:
            titles += stories.steps(1, MEMORY_BODY_TOKENS)
        await send_singly(url, titles[:part], clients=64)
        sizes.append(process.memory_info().rss)
        console.print(f"{(number + 1) * part:>7} requests: {sizes[-1] / 2**20:.1f} MiB")
    # Medians: what a batch needs for a moment comes and goes.
    growth = statistics.median(sizes[15:]) / statistics.median(sizes[5:10]) - 1
    rate = part * 20 / (time.perf_counter() - start)
    console.print(f"{rate:.0f} titles/s; memory changed by {growth:+.1%}, {MEMORY_SHARE:.0%} allowed")
    return growth <= MEMORY_SHARE


def main() -> int:
    """Run the benchmark and return the exit code: 1 where memory grows."""
    parser = argparse.ArgumentParser(description="Measures the reward server.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the server chooses")
    parser.add_argument("--model-size", choices=tuple(BODY_TOKENS), default="starter")
    parser.add_argument("--threads", type=int, help="CPU threads of each; unset: PyTorch decides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="training steps of 8 x 6 titles a round")
    parser.add_argument("--body-tokens", type=int, nargs="+", help="lengths of the bodies")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="loads, all by default")
    parser.add_argument("--quick", action="store_true", help="fewer body lengths, one round, no JSON")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    parser.add_argument("--requests", type=int, help="send so many titles and look at the memory instead")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    options.dtype = options.dtype or {"cpu": "float32", "cuda": "float16"}[options.device]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        logs = Path(folder)
        model = "starter" if options.model_size == "starter" else random_qwen(logs / "model")
        wanted = SERVERS if options.requests is None else ("ours_prefix",)
        running = {name: servers.enter_context(server(name, model, options, logs)) for name in wanted}
        for url, process in running.values():
            wait_ready(url, process)
        if options.requests is not None:
            stories = Stories(AutoTokenizer.from_pretrained(find_model(model).tokenizer))
            url, process = running["ours_prefix"]
            flat = asyncio.run(memory_is_flat(url, process.pid, options.requests, stories, console))
            return 0 if flat else 1
        rows = measure(options, model, {name: url for name, (url, _) in running.items()}, console)
    console.print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
