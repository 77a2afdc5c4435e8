"""Output of a run while it trains: a progress bar, `metrics.jsonl`, sampled completions, TensorBoard and W&B."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from rlhf_recipes.launch.checks import confirm
from rlhf_recipes.pages.metrics import SUPERVISED, TRAINING
from rlhf_recipes.recipe.messages import with_roles
from rlhf_recipes.runs.divergence import require_finite_output, require_finite_weights
from rlhf_recipes.runs.files import COMPLETIONS, COPY, MANIFEST, METRICS
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import as_table, start_wandb
from rlhf_recipes.system import files
from rlhf_recipes.system.files import read_json, step_of, write_whole, writing

logger = logging.getLogger(__name__)

SIZES = "log_sizes.json"
"""In a checkpoint: size and checksum of both logs when it was saved; earlier versions wrote the size alone."""

IN_PROGRESS_BAR = [name for name, metric in (TRAINING | SUPERVISED).items() if metric.progress]
"""Metrics that the progress bar shows, if the stage has them."""

COMPLETIONS_PER_LOG = 8
"""Sampled completions written at every logged step."""

TABLES, TABLE_ROWS = 20, 64
"""W&B: number of tables of completions that a run logs, evenly over its steps, and the rows of each."""


class RunCallback(TrainerCallback):
    """Writes metrics and some completions at every logged step, and shows one progress bar.

    A run that resumes first drops the lines written after its checkpoint: those steps are repeated. Completions come
    from the trainer's `sampled_completions`, if it has that method.
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
            self._resume(self.run.checkpoint, state.global_step)
        # disable=None: no bar unless the output is a terminal.
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"{self.run.stage:<7}",
            unit="step",
            disable=None,
            leave=False,
        )

    def _resume(self, checkpoint: Path, step: int) -> None:
        sizes = read_json(checkpoint / SIZES) if (checkpoint / SIZES).is_file() else {}
        _drop_later(self.run.path / COMPLETIONS, sizes.get(COMPLETIONS), step)
        for line in _drop_later(self.run.path / METRICS, sizes.get(METRICS), step):
            self._remember(line)
            self._started = time.monotonic() - line.get("seconds", 0.0)

    def _remember(self, logs: dict[str, Any]) -> None:
        self.last |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if isinstance(logs.get("score_mean"), float):
            self.scores.append(logs["score_mean"])

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:  # the summary at the end
            return
        self._remember(logs)
        line = {"step": state.global_step, "seconds": round(time.monotonic() - self._started, 3)}
        line |= {key: files.without_nan(value) for key, value in logs.items()}
        self._append(METRICS, [line])
        if self._bar is not None:
            self._bar.set_postfix({key: f"{self.last[key]:.3g}" for key in IN_PROGRESS_BAR if key in self.last})
        is_evaluation = any(key.startswith("eval_") for key in logs)
        if hasattr(self.trainer, "sampled_completions") and not is_evaluation:
            self._append(COMPLETIONS, self.trainer.sampled_completions(COMPLETIONS_PER_LOG))

    def on_checkpoint(self, folder: Path) -> None:
        """Write what a resumed run checks its logs and its manifest against. `Resumable` calls it before it marks `folder`."""
        logs = [path for path in (self.run.path / METRICS, self.run.path / COMPLETIONS) if path.exists()]
        write_whole(folder / SIZES, json.dumps({path.name: files.flushed(path) for path in logs}))
        shutil.copyfile(self.run.path / MANIFEST, folder / COPY)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()

    def summary(self) -> str:
        """The closing line of an on-policy stage. Its numbers also become the run's results."""
        if not self.scores:
            return "no rollout was logged: logging_steps is larger than the number of steps"
        tenth = max(1, len(self.scores) // 10)  # single rollouts are noisy
        first, last = (fmean(part) for part in (self.scores[:tenth], self.scores[-tenth:]))
        self.run.results = {
            "score_first": first,
            "score_last": last,
            "kl_last": self.last.get("kl"),
            "episodes": self.last.get("episodes"),
        }
        kl = f"KL {self.last['kl']:.1f}, " if "kl" in self.last else ""  # unknown without a reference model
        return f"score {first:.2f} -> {last:.2f}, {kl}{self.last.get('episodes', 0)} episodes"

    def _append(self, name: str, lines: list[dict]) -> None:
        with writing(name, self.run.path / name):
            files.append_lines(self.run.path / name, lines)


class EventsCallback(TensorBoardCallback):
    """TensorBoard, in which a resumed run looks like one that never stopped.

    It purges the events of repeated steps, and skips the summary at the end, which would appear twice.
    """

    def __init__(self, run: Run):
        later = None if run.checkpoint is None else step_of(run.checkpoint) + 1
        super().__init__(SummaryWriter(str(run.path / "tensorboard"), purge_step=later))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)


class CompletionTables(TrainerCallback):
    """W&B: draws all curves over episodes, and adds tables of the last rollout's completions.

    Add it before transformers' own callback: axes and table must exist when that one sends the line.
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
            # Name by name: a pattern `train/*` might lose against transformers' own `*`.
            wandb.define_metric(f"train/{name}", step_metric="train/episodes")
            self._charted.add(name)
        due = state.global_step * TABLES // state.max_steps
        if due == self._last_table or args.log_completions:  # then TRL makes a table itself
            return
        self._last_table = due
        rows = [
            {"step": row["step"], "prompt": with_roles(row["prompt"]), "completion": with_roles(row["completion"])}
            | {"advantage": row["advantage"]}
            | {f"score/{name}": value for name, value in row["scores"].items()}
            for row in self._trainer.sampled_completions(TABLE_ROWS)
        ]
        wandb.log({"completions": as_table(rows)}, commit=False)


class SetupCallback(TrainerCallback):
    """Checks the launch when training begins (`launch.checks.confirm`), and records it in the manifest."""

    def __init__(self, run: Run, trainer: Any):
        self._run, self._trainer = run, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._run.record_setup(confirm(self._trainer))


def _drop_later(path: Path, saved: dict[str, int] | int | None, step: int) -> list[dict]:
    """Drop the lines of a jsonl file that were written after a checkpoint; returns the others.

    `saved` is the entry in `SIZES` of the checkpoint of `step`; None: not known. A warning says if lines were lost.
    """
    if saved is None and not path.exists():
        return []
    size, checksum = (saved["size"], saved["crc32"]) if isinstance(saved, dict) else (saved, None)
    with writing(path.name, path):
        if path.exists() and size is not None:
            os.truncate(path, min(size, path.stat().st_size))
        if checksum not in (None, files.crc32_of(path) if path.exists() else 0):  # 0: of nothing
            logger.warning("%s has been damaged or changed since checkpoint-%d; only its whole lines stay.", path, step)
        kept = [line for line in files.read_log(path, needed=("step",)) if line["step"] <= step]
        write_whole(path, files.as_lines(kept))
    return kept


def attach(trainer: Any, run: Run) -> RunCallback:
    """Give a trainer our callbacks in place of its own printing, and trackers that resume with the run."""
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
    """Save the model (or its adapter) and tokenizer so that plain `from_pretrained(run folder)` loads them.

    All ranks call this. Files are written to a temporary folder and moved when they are complete.
    """
    require_finite_weights(trainer)
    require_finite_output(trainer)
    folder = run.path / ".final"
    # transformers' trainer switches the cache off in the configuration; a user of the saved model generates with it.
    for config in (trainer.model.config, getattr(trainer.model, "generation_config", None)):
        if config is not None:
            config.use_cache = True
    trainer.write_together("the final model", folder, lambda: trainer.save_model(str(folder)))
    if run.is_main:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml has the same settings
        shutil.rmtree(folder / "ref", ignore_errors=True)  # the frozen copy of the adapter, for the KL
        run.adopt(folder)
