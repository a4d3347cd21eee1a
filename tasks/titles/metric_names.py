"""Every metric's name, one line each; the x axis is the step, and row N holds what led to checkpoint N.

Lengths are in characters, times in seconds, `matches` is the share of titles with verdict True.
Counts are those of one step, over all batches that were drawn for it.
"""

from __future__ import annotations

TRAIN_REWARD = "train/reward"
TRAIN_SCORE = "train/score"
TRAIN_MATCHES = "train/matches"
TRAIN_LENGTH = "train/length"
TRAIN_LOSS = "train/loss"
TRAIN_ENTROPY = "train/entropy"
TRAIN_GRAD_NORM = "train/grad_norm"
TRAIN_KL = "train/kl"

TRAIN_TRAJECTORIES = "train/trajectories"  # titles with a reward
TRAIN_TOKENS = "train/tokens"  # sampled for them
TRAIN_TRAJECTORIES_DROPPED = "train/trajectories_dropped"  # failed ones; they have no reward at all
TRAIN_GROUPS_SUBMITTED = "train/groups_submitted"  # asked for
TRAIN_GROUPS_TRAINABLE = "train/groups_trainable"  # handed to the trainer
TRAIN_GROUPS_WITHOUT_SPREAD = "train/groups_without_spread"  # all rewards alike: no advantage, nothing to learn
TRAIN_GROUPS_DROPPED = "train/groups_dropped"  # fewer than two trajectories left
TRAIN_EMPTY_BATCHES = "train/empty_batches"  # batches without one trainable group, drawn before this step's
TRAIN_EMPTY_TITLES = "train/empty_titles"  # share of titles that are blank (reward 0, no judge asked)
TRAIN_DISTINCT_TITLES = "train/distinct_titles"  # distinct titles per title, mean over groups: 1 is all different
TRAIN_COLLAPSED = "train/collapsed"  # 1 while the collapse alarm rings

VERDICT_NEITHER = "verdict/neither"  # mean share of probability that the validator gives neither True nor False

CANARY_MEAN_DIFFERENCE = "canary/mean_difference"  # nats, between server and trainer, over the canary's tokens
CANARY_MAX_DIFFERENCE = "canary/max_difference"  # nats, the token that is farthest apart
CANARY_FOLLOWED = "canary/followed"  # 1: the server holds the trainer's new weights, 0: the old, 0.5: cannot be told

TIME_ROLLOUT = "time/rollout_s"  # writing and judging
TIME_JUDGE = "time/judge_s"  # its part in which titles were judged and none was written any more
TIME_TRAIN = "time/train_s"
TIME_SLEEP = "time/sleep_s"  # vLLM gives its memory back; with TRL it takes it again in this time too
TIME_RELOAD = "time/reload_s"  # the trainer's weights come back to the GPU
TIME_UPDATE = "time/update_s"  # forward and backward passes and the update
TIME_SAVE = "time/save_s"  # the checkpoint is written
TIME_WAKE = "time/wake_s"  # the trainer's weights make room where they must, and vLLM takes its memory again
TIME_SYNC = "time/sync_s"  # the sampler gets the new adapter; with TRL and the canary
TIME_STEP = "time/step_s"
TIME_EVAL = "time/eval_s"
TIME_ELAPSED = "time/elapsed_s"  # of training up to and including this step, over all sittings
THROUGHPUT_TOKENS = "throughput/tokens_per_s"  # sampled tokens per second of the whole step

VAL_REWARD = "val/reward"
VAL_SCORE = "val/score"
VAL_MATCHES = "val/matches"
VAL_LENGTH = "val/length"
VAL_TRAJECTORIES_DROPPED = "val/trajectories_dropped"
GPU_TRAINING_TIMES = (TIME_SLEEP, TIME_RELOAD, TIME_UPDATE, TIME_SAVE, TIME_WAKE, TIME_SYNC)
"""The parts of `TIME_TRAIN` that ART's service on a GPU measures."""
SUMMARY_PARTS = ("mean", "p5", "median", "p95", "std_dev")

VAL_REWARD_MEAN = f"{VAL_REWARD}/mean"
"""What the best checkpoint is chosen by."""
