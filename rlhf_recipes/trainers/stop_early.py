"""Ends an on-policy training early, by the recipe's `stop_when`."""

from itertools import pairwise
from typing import Any

from transformers import TrainerCallback

from rlhf_recipes.recipe.stages import StopWhen


class StopEarly(TrainerCallback):
    """Looks at every logged line and every evaluation; `reason` says why training ended early, None if it did not.

    It keeps nothing of its own: a resumed run finds earlier evaluations in the trainer's history.
    """

    def __init__(self, when: StopWhen):
        self._when = when
        self.reason: str | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        kl, bound = (logs or {}).get("kl"), self._when.kl_above
        if bound is not None and kl is not None and kl > bound:
            self._stop(state, control, f"the KL to the reference is {kl:.1f} nats per completion, above {bound:g}")

    def on_evaluate(self, args, state, control, **kwargs):
        falls = self._when.held_out_falls
        means = [line["eval_held_out_mean"] for line in state.log_history if "eval_held_out_mean" in line]
        if falls is not None and len(means) > falls and all(b < a for a, b in pairwise(means[-falls - 1 :])):
            numbers = " -> ".join(f"{mean:.3f}" for mean in means[-falls - 1 :])
            self._stop(state, control, f"the held-out score fell {falls} times in a row, {numbers}")

    def _stop(self, state: Any, control: Any, why: str) -> None:
        self.reason = f"at step {state.global_step} {why}"
        control.should_training_stop = True
