"""Trainers that can be killed at any moment, and that resume exactly from their last checkpoint."""

import os
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from rlhf_recipes.launch.checks import require_setup
from rlhf_recipes.launch.setup import setup_of
from rlhf_recipes.launch.start import on_stop
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.divergence import require_finite, require_finite_weights
from rlhf_recipes.runs.order import EpochSampler
from rlhf_recipes.system.files import checkpoints, last_complete, mark_complete, step_of, writing
from rlhf_recipes.system.terminal import expected


def resumable(trainer_class: type) -> type:
    """A TRL trainer's class with `Resumable` in front."""
    return type(trainer_class.__name__, (Resumable, trainer_class), {})


_Trainer: Any = object
"""The base class of `Resumable` for type checkers: any trainer."""


class Resumable(_Trainer):
    """Mixin before a TRL trainer: incomplete checkpoints are recognized, and resuming is exact.

    Changes to the trainer:
    1. The last file of a checkpoint lists all its files with checksums. Only then is an older checkpoint deleted.
    2. A checkpoint holds the sums since the last log line, so that the next line equals that of an unstopped run.
    3. No step is trained after a checkpoint of the last step; transformers' trainer would train one.
    4. A signal to stop (`STOP_SIGNALS`) saves a checkpoint at the end of the current step, the same on all ranks; then
       it takes effect. A second Ctrl-C takes effect at once.
    5. If a checkpoint cannot be written, it is removed, and all ranks stop.
    6. Training stops before the first optimizer step whose loss or gradient is not finite, and saves no such weights.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_of_step: Any = 0.0
        self._stop = StopCallback(self)
        self.add_callback(self._stop)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's; `resume_from_checkpoint=True` means the last complete checkpoint in `output_dir`.

        Raises:
            RecipeError: There is none, another setup saved it, or ZeRO-3 would never save a complete model.
        """
        plugin = self.accelerator.deepspeed_plugin if self.is_deepspeed_enabled else None
        sharding = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
        if sharding.get("stage") == 3 and sharding.get("stage3_gather_16bit_weights_on_model_save") is not True:
            raise RecipeError(
                "accelerate's configuration: with ZeRO-3 every process saves only its part of the model; set "
                "zero3_save_16bit_model: true under deepspeed_config."
            )
        if resume_from_checkpoint is True:
            found = last_complete(Path(self.args.output_dir)) if self.is_world_process_zero() else None
            found = broadcast_object_list([found])[0]
            if found is None:
                raise RecipeError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
            require_setup(found, setup_of(self))
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            self.args.eval_on_start = False  # the first start evaluated
        with (
            self._stop.listening(),
            expected(
                "do not match the ones in the `trainer_state.json`"
            ),  # such as save_steps: 0.1, stored as a number of steps
            expected(
                "missing keys in the checkpoint model"
            ),  # tied weights are saved once, a value head in its own file
        ):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if resume_from_checkpoint and self._initial_global_step >= self.state.max_steps:
                self._load_rng_state(resume_from_checkpoint)  # the parent does it when an epoch begins
        return output

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator()
            return EpochSampler(sampler, self.args.data_seed or self.args.seed, self)
        return sampler

    def _run_epoch(self, **arguments) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**arguments)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._loss_of_step = self._loss_of_step + loss.detach()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The parent calls it before every optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._loss_of_step = float(self._loss_of_step), 0.0
        require_finite(self, "loss", loss)
        if norm is not None and not self.args.fp16:  # fp16 skips such steps, and lowers its loss scale
            require_finite(self, "gradient norm", float(norm))
        return norm

    def _save_checkpoint(self, model, trial) -> None:
        require_finite_weights(self)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        is_main = self.is_world_process_zero()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # until the new one is complete

        def clear() -> None:
            if is_main and folder.exists():  # left by a killed attempt at this step
                shutil.rmtree(folder)

        def mark() -> None:
            if is_main and not self.args.save_only_model:  # without the optimizer's state, none can resume
                for callback in self.callback_handler.callbacks:
                    getattr(callback, "on_checkpoint", lambda folder: None)(folder)
                mark_complete(folder, setup_of(self).to_dict())

        try:
            for write in (clear, lambda: super(Resumable, self)._save_checkpoint(model, trial), mark):
                self.write_together(folder.name, folder, write)
        finally:
            self.args.save_total_limit = limit
        if is_main and limit is not None and limit > 0:
            best = self.state.best_model_checkpoint
            # By step: a clock that steps back makes the newest files look old.
            older = [path for path in checkpoints(folder.parent) if step_of(path) < self.state.global_step]
            others = [path for path in older if str(path) != best]
            for path in others[: max(0, len(older) + 1 - limit)]:
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_deepspeed_enabled and state_dict is not None:
            # accelerate's copy holds tied weights as separate tensors, which would be written twice.
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def write_together(self, what: str, folder: Path, write: Callable[[], None]) -> None:
        """Call `write`, which writes to `folder`, on every rank. If it fails on one, the folder is removed and all stop.

        Raises:
            RecipeError: On the main process, with the reason. The other ranks exit without a message.
        """
        error: Exception | None = None
        try:
            with writing(what, folder):
                write()
        except Exception as caught:  # noqa: BLE001 - raised below, after the other ranks know
            error = caught
        words = [None if error is None else str(error)]
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # Their saving waits for all ranks: a rank that failed must exit, and the launcher ends the others.
            if error is None:
                self.accelerator.wait_for_everyone()
        elif self.args.world_size > 1:
            words = [word for word in gather_object(words) if word is not None] or [None]
        if words[0] is None:
            return
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        if error is not None and not isinstance(error, RecipeError):
            raise error
        if self.is_world_process_zero() or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RecipeError(words[0]) from error
        raise SystemExit(2)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        since_last_log = {
            "loss": self._tr_loss.item(),
            "loss_so_far": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": dict(self._metrics["train"]),
        }
        torch.save(since_last_log, self._since_last_log(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._since_last_log(checkpoint).is_file():  # another trainer saved it
            return
        saved = torch.load(self._since_last_log(checkpoint), weights_only=True)
        self._tr_loss.fill_(saved["loss"])
        self._total_loss_scalar = saved["loss_so_far"]
        self._globalstep_last_logged = saved["last_logged"]
        self._total_train_tokens = saved["tokens"]
        self._metrics["train"] = defaultdict(list, saved["metrics"])

    def _since_last_log(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"since_last_log_{self.args.process_index}.pt"


class StopCallback(TrainerCallback):
    """Ends training after the current step when asked to, and saves each checkpoint at a point training can resume from.

    At the end of an epoch, that point is after the epoch's own logging and evaluation: a resumed run skips them.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._asked: int | None = None  # the signal
        self._stopping = False
        self._save_due = False
        self._saved_step: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Delays `STOP_SIGNALS` until the end of the step; on exit, the signal has its earlier effect."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return
        process = os.getpid()

        def note(number, frame) -> None:
            if os.getpid() != process:  # a forked child, such as a worker of a reward function
                if number == signal.SIGTERM:  # a terminal sends the others to all its processes, and this one decides
                    signal.signal(number, signal.SIG_DFL)
                    signal.raise_signal(number)
            elif number == signal.SIGINT and self._asked is not None:
                signal.default_int_handler(number, frame)
            else:
                self._asked = self._asked or number

        before = on_stop(note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._asked is not None or self._stopping:
            number, self._asked, self._stopping = self._asked or signal.SIGTERM, None, False
            signal.raise_signal(number)

    def on_step_end(self, args, state, control, **kwargs):
        self._stopping = self._asked_anywhere()
        if self._stopping:
            control.should_training_stop = True
        if control.should_training_stop or state.epoch.is_integer():
            self._save_due = control.should_save or self._stopping
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._stopping and not state.epoch.is_integer() and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = False  # the epoch is not over
        if self._save_due and self._saved_step != state.global_step:
            control.should_save = True
        self._save_due = False

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step

    def _asked_anywhere(self) -> bool:
        """Whether any rank has been asked to stop. A signal may reach the ranks in different steps."""
        if self._trainer.args.world_size == 1:
            return self._asked is not None
        asked = torch.tensor([float(self._asked is not None)], device=self._trainer.accelerator.device)
        return self._trainer.accelerator.reduce(asked).item() > 0
