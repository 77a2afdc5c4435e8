"""An order of rows for each epoch that depends on seed and epoch only, so that resume is exact."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """A sampler whose generator is seeded anew for every epoch.

    The samplers of TRL and of `group_by_length` draw the orders of all epochs from one generator. A resumed run would
    start again with the first.

    Args:
        sampler: Has a `generator`.
        seed: Of the first epoch.
        trainer: Knows the current epoch.
    """

    def __init__(self, sampler: Any, seed: int, trainer: Any):
        self._sampler, self._seed, self._trainer = sampler, seed, trainer

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        if getattr(self._sampler, "shuffle", True):
            epoch = int(self._trainer.state.epoch or 0)
            # Not seed + epoch, which is the next seed's first order.
            mixed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            self._sampler.generator.manual_seed(mixed if epoch else self._seed)
        return iter(self._sampler)
