"""Every error that this project raises on purpose.

HnTitlesError                  what was expected, what came, what to do
├── UserError                  the user can mend it: shown without a traceback, exit code 2
│   ├── ConfigError            a profile, a setting or a flag
│   └── DataError              stories that cannot be read or of which none are left
├── ServiceError               something we talk to over HTTP
│   ├── ServiceUnavailable     down, slow or overloaded after all retries (transient)
│   ├── ServiceRejected        it refused the request; asking again will not help
│   └── UnreadableVerdict      the validator answered neither True nor False
├── RunStopped                 training stopped itself; the reason says why
│   ├── TooManyFailures        more trajectories failed than the profile allows
│   ├── NothingToTrainOn       no group had any spread of rewards for too many batches
│   ├── SamplerDisagrees       the canary: sampler and trainer hold different weights
│   ├── EngineDied             a process of the engine ended: vLLM's server, or the trainer
│   └── OutOfMemory            the GPU's memory is full
└── CheckpointError            a checkpoint that is missing, incomplete or of another run
"""

from __future__ import annotations


class HnTitlesError(Exception):
    """Base of the tree above."""

    exit_code = 1


class UserError(HnTitlesError):
    """Something the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A profile, a setting or a flag is wrong."""


class DataError(UserError):
    """Stories cannot be read, or none are left after the filters."""


class ServiceError(HnTitlesError):
    """A service we talk to over HTTP did not do what was asked."""

    exit_code = 3
    service = "service"
    """Which one (policy, validator, reward model); failures are counted under it."""


class ServiceUnavailable(ServiceError):
    """Down, slow or overloaded after all retries."""


class ServiceRejected(ServiceError):
    """The service refused the request; the same request will be refused again."""

    status: int | None = None
    """The HTTP status of the refusal, None where there was an answer that cannot be used."""


class UnreadableVerdict(ServiceError):
    """The validator answered neither True nor False."""

    neither: float | None = None
    """The share of probability on other words than these two, where the validator's probabilities are known."""


class RunStopped(HnTitlesError):
    """Training stopped itself; the message is the reason."""

    exit_code = 4


class TooManyFailures(RunStopped):
    """More trajectories failed than the profile allows."""


class NothingToTrainOn(RunStopped):
    """No trajectory group had any spread of rewards for too many batches in a row."""


class SamplerDisagrees(RunStopped):
    """The canary: the sampler's log-probabilities are not the trainer's, or still those from before its updates."""


class EngineDied(RunStopped):
    """A process that the engine cannot do without has ended, or did not start: vLLM's server, or the trainer."""


class OutOfMemory(RunStopped):
    """The GPU's memory does not hold what training needs."""


class CheckpointError(HnTitlesError):
    """A checkpoint is missing, incomplete or belongs to another run."""

    exit_code = 5
