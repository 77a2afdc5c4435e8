"""Data of an on-policy trainer: a forward pass, a rollout, and the values that a run keeps between rollouts."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from rlhf_recipes.models.forward import longest
from rlhf_recipes.trainers.advantages import RunningMoments

logger = logging.getLogger(__name__)


@dataclass
class Forward:
    """Results of a forward pass for the sampled tokens, (B, T) each; None: not computed."""

    logps: Tensor
    entropies: Tensor | None
    values: Tensor | None
    aux_loss: Tensor | None


@dataclass
class Rollout:
    """The values of one rollout, filled in step by step: B completions of this process, N of all processes."""

    policy_pass: Forward | None = None
    """The policy's pass over the rollout."""
    ref_pass: Forward | None = None
    """The reference's pass over the rollout; None if beta is 0."""
    finished: Tensor | None = None
    """True: the completion ended with EOS, (N,)."""
    rewards_per_func: Tensor | None = None
    """Value of each reward function, (N, functions); NaN: the function does not apply."""
    scores: Tensor | None = None
    """Weighted sum of the values after normalization, clipping and missing_eos, (N,); NaN: no function applies."""
    kl: Tensor | None = None
    """KL estimate of every token, (B, T); 0 outside completions, and without a reference."""

    def add(self, found: Forward) -> None:
        """Keeps a pass over the rollout. TRL computes the policy's pass first, then the reference's."""
        if self.policy_pass is None:
            self.policy_pass = found
        else:
            self.ref_pass = found


def in_parts(
    forward: Callable[[Tensor, Tensor, int], Forward], input_ids: Tensor, attention_mask: Tensor, length: int, size: int
) -> Forward:
    """A pass over all rows in parts: each part has rows of similar length, without their common padding.

    Args:
        forward: Computes a part from its ids, its mask and its number of completion tokens.
        input_ids: Prompts and completions, (B, P + T).
        attention_mask: (B, P + T).
        length: T.
        size: Rows of a part.
    """
    P = input_ids.size(1) - length
    parts, order = [], attention_mask.sum(1).argsort(descending=True)
    for rows in order.split(size):
        p, t = longest(attention_mask[rows, :P], attention_mask[rows, P:])
        columns = slice(P - p, P + t)
        part = forward(input_ids[rows, columns], attention_mask[rows, columns], t)
        tensors = (part.logps, part.entropies, part.values)
        parts.append([None if x is None else nn.functional.pad(x, (0, length - t)) for x in tensors])
    back = order.argsort()
    whole = [None if column[0] is None else torch.cat(column)[back] for column in zip(*parts, strict=True)]
    return Forward(*whole, aux_loss=None)


@dataclass
class RunState:
    """Values that an on-policy run keeps from one rollout to the next."""

    episodes: int = 0
    """Completions sampled so far, over all processes."""
    warned_of: list[str] = field(default_factory=list)
    score_moments: RunningMoments = field(default_factory=RunningMoments)
    reward_moments: RunningMoments = field(default_factory=RunningMoments)

    def warn_once(self, topic: str, message: str) -> None:
        """Logs a warning, unless this run has logged one on the topic."""
        if topic not in self.warned_of:
            self.warned_of.append(topic)
            logger.warning(message)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"score_moments": vars(self.score_moments), "reward_moments": vars(self.reward_moments)}

    def load(self, saved: dict[str, Any]) -> None:
        self.episodes, self.warned_of = saved["episodes"], saved["warned_of"]
        vars(self.score_moments).update(saved["score_moments"])
        vars(self.reward_moments).update(saved["reward_moments"])


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Inside, random numbers come from the seed and the rank; afterwards all streams are as before."""
    states = random.getstate(), np.random.get_state()
    # Only this process's GPU: touching another one would take memory there.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        set_seed(seed, device_specific=True)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def read_state(file: Path, device: torch.device) -> dict[str, Any]:
    # With several processes on a CPU the device is cpu:0, which torch cannot load to.
    return torch.load(file, map_location="cpu" if device.type == "cpu" else device, weights_only=True)
