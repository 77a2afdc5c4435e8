"""The end of a training stage: the final model goes to the run folder whole or not at all."""

import shutil
from typing import Any

from rlhf_recipes.runs.folder import Run


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
