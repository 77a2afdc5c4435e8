"""How much stages sft and reward measure, and about how long that takes."""

import logging
import random
from typing import Any

from rlhf_recipes.recipe.batch import rows_of_step
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.terminal import say

SHARE, LEAST = 0.15, 64
"""Rows to measure for each row of training, and the least. A forward pass takes a third of a training step's time, or
half of it with an adapter. Stage reward measures so many rows twice, and gold texts, each half a pair: 0.19 at most."""


def usual_rows(args: Any, rows: int) -> int:
    """The default of `eval_rows` for so many training rows."""
    steps = args.max_steps
    trained = steps * rows_of_step(vars(args), args.world_size) if steps > 0 else rows * args.num_train_epochs
    return max(LEAST, round(SHARE * trained))


def drawn(rows: Any, most: int, seed: int) -> Any:
    """At most so many rows of a data set."""
    return rows if len(rows) <= most else rows.select(random.Random(seed).sample(range(len(rows)), most))


def announce(run: Run, trainer: Any, seconds: float, numbers: dict[str, int]) -> None:
    """Say how many rows of each kind are measured, and how long that takes if training steps took so many seconds."""
    line = f"measures {', '.join(f'{number} {kind}' for kind, number in numbers.items() if number)}"
    if steps := trainer.state.global_step - trainer._initial_global_step:  # none after a resume at the last step
        forward = seconds / steps / rows_of_step(vars(trainer.args), trainer.args.world_size) / 3
        line += f", about {forward * sum(numbers.values()):.0f} s"
    if run.is_main:
        logging.getLogger(__name__).info(line)
        say(f"{run.stage:<8} {line}")
