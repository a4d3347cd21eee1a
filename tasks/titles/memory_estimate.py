"""How much memory a training takes, before it starts: sums over what is known exactly and a few rough constants.

Exact are weights, adapter, optimiser and the key-value cache; they follow from the model's shape. Rough are what
libraries take for themselves and what a pass has to remember: each constant says where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tasks.titles.config import Profile
from tasks.titles.model_shape import ModelShape
from tasks.titles.packed_sequences import LOGPROB_CHUNK, longest_sequence

GB = 10**9
HALF, FLOAT = 2, 4
"""Bytes of a 16-bit and of a 32-bit number."""
FOUR_BIT = 0.56
"""Bytes of a 4-bit weight: half a byte, and a 32-bit scale for each 64 weights (bitsandbytes' NF4)."""
ADAPTER_TRAINING = FLOAT + FLOAT + 2
"""Bytes a LoRA weight takes in training: itself and its gradient in 32 bits, two 8-bit moments of AdamW."""
ADAPTER_TRAINING_CPU = FLOAT + FLOAT + 2 * FLOAT
"""The same with 32-bit moments."""
CUDA_PROCESS = 0.7 * GB
"""What a process takes of a GPU before its first tensor: CUDA's context and its libraries' kernels. Rough; drivers
and GPUs differ between 0.3 and 1 GB."""
VLLM_WORK = 3.0 * GB
"""What vLLM keeps of its share besides weights and cache: its widest pass, graphs and CUDA. With vLLM 0.22.1 on an
H100, reading 8,192 or 16,384 tokens in a pass, it was 2.8 GB at Qwen2.5-0.5B's size and 3.0 GB at 7B's."""
VLLM_ASLEEP = 0.8 * GB
"""What a sleeping vLLM leaves on the GPU: 0.8 GB, measured with vLLM 0.22.1 on an H100."""
RESERVE = 4 * 2**30
"""Bytes that have to be free beside an awake vLLM and the trainer's weights for these to stay on the GPU: for the
canary, and for what PyTorch keeps."""
MASK_AT_WORK = 4
"""Bytes that the layer at work makes of the packing mask for each pair of tokens: Unsloth a boolean one, and PyTorch's
attention the opposite of it and a 16-bit one again."""
LOGIT_COPIES = 4
"""How many 32-bit tables of logits live at once: logits, log-softmax, and two that make the entropy of it, or the two
gradients in the backward pass."""
CPU_PROCESS = 0.7 * GB
"""What a Python process with torch and transformers takes before its model. Rough."""
CPU_PROCESSES = 3
"""Processes of a training on a CPU that load torch: the flow, the policy's own, and the reward server."""

Limit = Literal["gpu", "ram"]


@dataclass(frozen=True, slots=True)
class Part:
    """One addend."""

    name: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """What is in memory at the same time."""

    name: str
    limit: Limit
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        """The sum."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Cache:
    """What vLLM can hold of keys and values in its share of the GPU."""

    tokens: int
    longest: int
    """Tokens of the longest prompt with its title and what the validator adds."""

    @property
    def at_once(self) -> float:
        """Texts of the longest length that are written at once; prompts that begin alike share their part."""
        return self.tokens / self.longest if self.longest else 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """All phases of a training, and vLLM's cache where vLLM samples."""

    phases: tuple[Phase, ...]
    cache: Cache | None


def weight_bytes(shape: ModelShape, *, four_bit: bool = False) -> float:
    """Return the bytes of the base weights on a GPU: 16 bits each, or 4 bits where they are compressed."""
    if not four_bit:
        return shape.parameters * HALF
    return (shape.parameters - shape.linear_parameters) * HALF + shape.linear_parameters * FOUR_BIT


def activation_bytes(shape: ModelShape, tokens: int) -> float:
    """Return what a pass with gradient checkpointing remembers of `tokens` tokens, in 16-bit numbers.

    Each layer keeps its input alone (Chen et al. 2016); the layer that is being computed anew besides holds its
    norms, queries, keys, values, attention and output (six times the width at most) and the three wide parts of its
    MLP with their gradients. Attention kernels keep no table of all pairs.
    """
    kept = shape.layers * tokens * shape.hidden
    working = tokens * (6 * shape.hidden + 6 * shape.intermediate)
    return (kept + working) * HALF


def logit_bytes(shape: ModelShape, tokens: int) -> float:
    """Return what the log-probabilities of `tokens` tokens take in a backward pass."""
    return LOGIT_COPIES * tokens * shape.vocabulary * FLOAT


def vllm_cache(shape: ModelShape, share_bytes: float, longest: int) -> Cache:
    """Return how many tokens fit beside the weights into vLLM's share."""
    free = share_bytes - weight_bytes(shape) - VLLM_WORK
    return Cache(max(0, int(free / shape.kv_bytes_per_token(HALF))), longest)


def adapter_bytes(profile: Profile, shape: ModelShape) -> tuple[int, int]:
    """Return the bytes of a checkpoint's adapter and of its optimiser's state on disk."""
    count = shape.lora_parameters(profile.lora_rank)
    return count * FLOAT, count * (2 * FLOAT if profile.device == "cpu" else 2)


def checkpoints_kept(profile: Profile) -> int:
    """Return how many checkpoints a run holds at its end: the untrained one, the best and the newest."""
    return min(profile.max_steps + 1, profile.keep_checkpoints + 2)


def estimate(
    profile: Profile, shape: ModelShape, *, gpu_bytes: float, free_bytes: float, longest: int, judge_bytes: float
) -> Estimate:
    """Return what `profile` needs.

    `gpu_bytes` is one GPU's whole memory, of which vLLM takes its share; `free_bytes` is what of it nobody holds
    before the run; `longest` is the most tokens that the
    policy's server reads and writes for one text; `judge_bytes` is what the reward models hold.
    """
    if profile.device == "cpu":
        return Estimate((_on_cpu(profile, shape, judge_bytes),), None)
    judge = (Part("reward models", judge_bytes + CUDA_PROCESS),) if judge_bytes else ()
    if profile.engine == "art":
        phases = _art(profile, shape, gpu_bytes, free_bytes - sum(part.bytes for part in judge))
    else:
        phases = _trl(profile, shape, gpu_bytes)
    share = profile.art.vllm_memory_share if profile.engine == "art" else profile.trl.vllm_memory_share
    elsewhere = profile.engine == "trl" and profile.trl.vllm_mode == "server"
    return Estimate(
        tuple(Phase(phase.name, phase.limit, (*phase.parts, *judge)) for phase in phases),
        None if elsewhere else vllm_cache(shape, share * gpu_bytes, longest),
    )


def _on_cpu(profile: Profile, shape: ModelShape, judge_bytes: float) -> Phase:
    longest = longest_sequence(profile, shape.max_positions)
    tokens = longest.tokens
    adapter = shape.lora_parameters(profile.lora_rank)
    parts = (
        Part("processes", CPU_PROCESSES * CPU_PROCESS),
        # One process samples, one trains.
        Part("base weights, 32 bits, twice", 2 * shape.parameters * FLOAT),
        Part("adapter and optimiser", adapter * ADAPTER_TRAINING_CPU),
        Part("activations and logits", 2 * activation_bytes(shape, tokens) + logit_bytes(shape, longest.scored)),
        Part("key-value cache", profile.rollout_concurrency * tokens * shape.kv_bytes_per_token(FLOAT)),
        Part("reward models", judge_bytes * 2),
    )
    return Phase("training", "ram", parts)


def _art(profile: Profile, shape: ModelShape, gpu_bytes: float, room: float) -> tuple[Phase, ...]:
    """ART: one process trains, vLLM's serves; on a GPU that they share, each leaves it while the other works, but for
    the trainer's weights where they fit beside vLLM into `room`, the bytes that nobody else holds."""
    shared = not profile.art.trainer_gpus
    vllm = Part("vLLM's share", profile.art.vllm_memory_share * gpu_bytes)
    cuda = Part("CUDA, two processes", 2 * CUDA_PROCESS) if shared else Part("CUDA", CUDA_PROCESS)
    weights = (
        Part("base weights", weight_bytes(shape, four_bit=profile.art.load_in_4bit)),
        Part("adapter and optimiser", shape.lora_parameters(profile.lora_rank) * ADAPTER_TRAINING),
    )
    asleep = Part("vLLM asleep", VLLM_ASLEEP) if profile.art.sleep else vllm
    beside = sum(part.bytes for part in (vllm, cuda, *weights))
    stay = shared and (not profile.art.sleep or (profile.updates_per_step == "one" and beside + RESERVE <= room))
    return (
        Phase("rollouts", "gpu", (vllm, *(weights if stay else ()), cuda)),
        Phase("training", "gpu", (*weights, *_art_pass(profile, shape), *((asleep,) if shared else ()), cuda)),
    )


def _art_pass(profile: Profile, shape: ModelShape) -> tuple[Part, ...]:
    """What a forward and a backward pass take: this project's over packed sequences, or ART's own."""
    longest = longest_sequence(profile, shape.max_positions)
    activations = Part("activations", activation_bytes(shape, longest.tokens))
    mask = longest.tokens**2 * HALF
    if profile.updates_per_step == "per_sequence":
        # ART makes the mask for each trajectory, and Unsloth puts it aside.
        logits = logit_bytes(shape, min(LOGPROB_CHUNK, longest.tokens))
        return activations, Part("attention mask", mask), Part("logits", logits)
    return (
        activations,
        Part("attention mask", mask + longest.tokens**2 * MASK_AT_WORK),
        Part("logits", logit_bytes(shape, longest.scored)),
        Part("output layer, 32 bits", shape.embeddings * FLOAT),
    )


def _trl(profile: Profile, shape: ModelShape, gpu_bytes: float) -> tuple[Phase, ...]:
    """TRL: trainer and vLLM in one process; the trainer's weights stay on the GPU, and vLLM leaves it while it trains,
    unless it is told to stay or is Unsloth's, whose weights are the trainer's."""
    titles = min(profile.trl.micro_batch, max(1, profile.groups_per_step * profile.group_size // profile.devices))
    tokens = titles * (profile.max_prompt_tokens + profile.max_completion_tokens)
    colocated = profile.trl.vllm_mode == "colocate"
    own = (
        *(() if profile.trl.unsloth else (Part("base weights", weight_bytes(shape)),)),
        Part("adapter and optimiser", shape.lora_parameters(profile.lora_rank) * ADAPTER_TRAINING),
        Part("CUDA", CUDA_PROCESS),
    )
    share = (Part("vLLM's share", profile.trl.vllm_memory_share * gpu_bytes),) if colocated else ()
    sleeps = colocated and profile.trl.vllm_sleep and not profile.trl.unsloth
    beside = (Part("vLLM asleep", VLLM_ASLEEP),) if sleeps else share
    work = (
        Part("activations", activation_bytes(shape, tokens)),
        # TRL asks for the logits of the titles alone.
        Part("logits", logit_bytes(shape, titles * (profile.max_completion_tokens + 1))),
    )
    return Phase("rollouts", "gpu", (*own, *share)), Phase("training", "gpu", (*own, *work, *beside))
