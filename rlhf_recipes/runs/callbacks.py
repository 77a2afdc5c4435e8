"""What a training run shows and writes while it goes: a progress bar, `metrics.jsonl` and sampled completions."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from rlhf_recipes.launch.setup import confirm
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import as_cell, as_table, start_wandb
from rlhf_recipes.system.files import append_lines, step_of, without_nan, write_whole, writing

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"

SIZES = "log_sizes.json"
"""In a checkpoint: bytes of both files when it was saved. Without it, the process was killed before it wrote more."""

SHOWN = ("score_mean", "kl", "loss", "accuracy", "mean_token_accuracy")
"""Metrics in the progress bar, where the stage has them."""

COMPLETIONS_PER_LOG = 8
"""Sampled completions that are written at every logged step."""

TABLES, TABLE_ROWS = 20, 64
"""W&B: tables of completions that a training run logs, evenly over its steps, and the completions in each."""


class RunCallback(TrainerCallback):
    """Writes a line of metrics for every logged step, some completions with it, and keeps one progress bar.

    A run that goes on from a checkpoint first drops what was written after it: those steps are coming again.

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
        if not state.is_world_process_zero:
            return
        if self.run.checkpoint is not None:
            self._go_on(self.run.checkpoint, state.global_step)
        # disable=None: no bar where the output is not a terminal.
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"{self.run.stage:<7}",
            unit="step",
            disable=None,
            leave=False,
        )

    def _go_on(self, checkpoint: Path, step: int) -> None:
        sizes = {}
        if (checkpoint / SIZES).is_file():
            sizes = json.loads((checkpoint / SIZES).read_text(encoding="utf-8"))
        _drop_later(self.run.path / COMPLETIONS, sizes.get(COMPLETIONS), step)
        for line in _drop_later(self.run.path / METRICS, sizes.get(METRICS), step):
            self._remember(line)
            self._started = time.monotonic() - line["seconds"]

    def _remember(self, logs: dict[str, Any]) -> None:
        self.last |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if isinstance(logs.get("score_mean"), float):
            self.scores.append(logs["score_mean"])

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:  # the last: a summary, no step
            return
        self._remember(logs)
        line = {"step": state.global_step, "seconds": round(time.monotonic() - self._started, 3)}
        line |= {key: without_nan(value) for key, value in logs.items()}
        self._append(METRICS, [line])
        if self._bar is not None:
            self._bar.set_postfix({key: f"{self.last[key]:.3g}" for key in SHOWN if key in self.last})
        if hasattr(self.trainer, "sampled_completions"):
            self._append(COMPLETIONS, self.trainer.sampled_completions(COMPLETIONS_PER_LOG))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            files = [path for path in (self.run.path / METRICS, self.run.path / COMPLETIONS) if path.exists()]
            checkpoint = self.run.path / f"checkpoint-{state.global_step}"
            with writing(checkpoint.name, checkpoint):
                for path in files:
                    with open(path, "r+b") as file:
                        os.fsync(file.fileno())
                write_whole(checkpoint / SIZES, json.dumps({path.name: path.stat().st_size for path in files}))

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
        kl = f"KL {self.last['kl']:.1f}, " if "kl" in self.last else ""  # without a reference it is not known
        return f"score {first:.2f} -> {last:.2f}, {kl}{self.last.get('episodes', 0)} episodes"

    def _append(self, name: str, lines: list[dict]) -> None:
        with writing(name, self.run.path / name):
            append_lines(self.run.path / name, lines)


class EventsCallback(TensorBoardCallback):
    """TensorBoard, where a run that goes on looks like one that was never stopped.

    Events of steps that are coming again are left out, and so is the summary at the end, which would be there twice.
    """

    def __init__(self, run: Run):
        later = None if run.checkpoint is None else step_of(run.checkpoint) + 1
        super().__init__(SummaryWriter(str(run.path / "tensorboard"), purge_step=later))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)


class CompletionTables(TrainerCallback):
    """W&B: draws all curves over episodes, and adds tables of the last rollout's completions.

    It comes before transformers' own callback, so that axes and table are there when that one sends the line.

    Args:
        trainer: The on-policy trainer, for its sampled completions.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._charted: set[str] = set()
        self._last_table = -1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "wandb" not in args.report_to or "episodes" not in logs or "train_runtime" in logs:
            return
        import wandb

        if wandb.run is None:  # another process than the main one, or W&B is disabled
            return
        for name in sorted(logs.keys() - self._charted - {"episodes", "epoch"}):
            # By name: of `train/*` and transformers' own `*`, either may win.
            wandb.define_metric(f"train/{name}", step_metric="train/episodes")
            self._charted.add(name)
        due = state.global_step * TABLES // state.max_steps
        if due == self._last_table or args.log_completions:  # with the latter, TRL makes a table itself
            return
        self._last_table = due
        rows = [
            {"step": row["step"], "prompt": as_cell(row["prompt"]), "completion": as_cell(row["completion"])}
            | {"advantage": row["advantage"]}
            | {f"score/{name}": value for name, value in row["scores"].items()}
            for row in self._trainer.sampled_completions(TABLE_ROWS)
        ]
        wandb.log({"completions": as_table(rows)}, commit=False)


class SetupCallback(TrainerCallback):
    """Writes into the manifest how the run is spread over processes, before the first step; see `distributed.confirm`."""

    def __init__(self, run: Run, trainer: Any):
        self._run, self._trainer = run, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._run.record_setup(confirm(self._trainer))


def _drop_later(path: Path, size: int | None, step: int) -> list[dict]:
    """Cut from a jsonl file what was written after a checkpoint, half a line included; returns what is left.

    Args:
        path: The file; without it there is nothing to cut.
        size: Its bytes when the checkpoint was saved, where known.
        step: The checkpoint's step.
    """
    if not path.exists():
        return []
    whole = [line for line in path.read_bytes()[:size].split(b"\n")[:-1] if json.loads(line)["step"] <= step]
    with writing(path.name, path):
        write_whole(path, b"".join(line + b"\n" for line in whole).decode())
    return [json.loads(line) for line in whole]


def attach(trainer: Any, run: Run) -> RunCallback:
    """Give a trainer our callback in place of its own printing, and trackers that go on where the run goes on."""
    callback = RunCallback(run, trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SetupCallback(run, trainer))
    trainer.add_callback(callback)
    if run.is_main:
        if "wandb" in trainer.args.report_to:
            start_wandb(run.recipe, run.stage, run.path, run.manifest["id"])
        trainer.remove_callback(TensorBoardCallback)
        trainer.add_callback(EventsCallback(run))
    return callback


def save_model(trainer: Any, run: Run) -> None:
    """Save model, or the adapter that was trained, and tokenizer so that plain `from_pretrained(run folder)` loads them.

    All ranks call this. Files are written to a folder of their own and moved when they are complete.
    """
    folder = run.path / ".final"
    # transformers' trainer switches the cache off for training, in the saved configuration too; whoever loads the
    # model wants to generate with it.
    for config in (trainer.model.config, getattr(trainer.model, "generation_config", None)):
        if config is not None:
            config.use_cache = True
    trainer.write_together("the final model", folder, lambda: trainer.save_model(str(folder)))
    if run.is_main:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same, readably
        shutil.rmtree(folder / "ref", ignore_errors=True)  # the adapter as it was when training began, for the KL
        run.adopt(folder)
