"""What a training run shows and writes while it goes: a progress bar, `metrics.jsonl` and sampled completions."""

import json
import math
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from rlhf_recipes.run import Run

SHOWN = ("score_mean", "kl", "loss", "accuracy", "mean_token_accuracy")
"""Metrics in the progress bar, where the stage has them."""

COMPLETIONS_PER_LOG = 8
"""Sampled completions that are written at every logged step."""


class RunCallback(TrainerCallback):
    """Writes a line of metrics for every logged step, some completions with it, and keeps one progress bar.

    Args:
        run: The run whose folder is written to.
        trainer: The trainer; one that samples is asked for its completions.
    """

    def __init__(self, run: Run, trainer: Any):
        self.run, self.trainer = run, trainer
        self.scores: list[float] = []
        self.last: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.monotonic()
        if state.is_world_process_zero:
            # disable=None: no bar where the output is not a terminal.
            self._bar = tqdm(total=state.max_steps, desc=f"{self.run.stage:<7}", unit="step", disable=None, leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:  # the last: a summary, no step
            return
        self.last |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if isinstance(logs.get("score_mean"), float):
            self.scores.append(logs["score_mean"])
        line = {"step": state.global_step, "seconds": round(time.monotonic() - self._started, 3)}
        line |= {key: _finite(value) for key, value in logs.items()}
        self._append("metrics.jsonl", [line])
        if self._bar is not None:
            self._bar.set_postfix({key: f"{self.last[key]:.3g}" for key in SHOWN if key in self.last})
        if hasattr(self.trainer, "sampled_completions"):
            self._append("completions.jsonl", self.trainer.sampled_completions(COMPLETIONS_PER_LOG))

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()

    def summary(self) -> str:
        """What an on-policy stage has to say when it is finished; also kept as the run's results."""
        few = max(1, len(self.scores) // 10)  # single rollouts are noisy
        first, last = (sum(part) / max(len(part), 1) for part in (self.scores[:few], self.scores[-few:]))
        self.run.results = {
            "score_first": first,
            "score_last": last,
            "kl_last": self.last.get("kl"),
            "episodes": self.last.get("episodes"),
        }
        return f"score {first:.2f} -> {last:.2f}, KL {self.last.get('kl', 0.0):.1f}, {self.last.get('episodes', 0)} episodes"

    def _append(self, name: str, lines: list[dict]) -> None:
        with open(self.run.path / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def attach(trainer: Any, run: Run) -> RunCallback:
    """Give a trainer our callback in place of its own printing."""
    callback = RunCallback(run, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    return callback
