"""The run that an audit looks at: its recipe, its logs and its models."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.recipe.stages import OnPolicy
from rlhf_recipes.runs.files import METRICS, read_manifest
from rlhf_recipes.system.files import MARKER, checkpoints, read_log, step_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = "start"
"""Name of the policy that training started from."""


@dataclass
class Model:
    """The policy at one step of the training."""

    name: str
    step: int
    id: str
    """Model id: a folder, a Hub id or `stage:NAME`."""


@dataclass
class AuditedRun:
    """A run of ppo or rloo. In its recipe, `stage:NAME` stands for the folder beside the run's."""

    path: Path
    stage: str
    recipe: Recipe
    manifest: dict[str, Any]

    @property
    def settings(self) -> OnPolicy:
        return getattr(self.recipe, self.stage)

    @property
    def held_out_name(self) -> str | None:
        """Name of the held-out score; None without one."""
        return " + ".join(spec.name.rpartition(":")[2] for spec in self.recipe.eval.held_out_funcs) or None

    @property
    def is_finished(self) -> bool:
        return self.manifest["status"] == "finished"

    def logged(self, file: str) -> list[dict[str, Any]]:
        """Lines of a log; none without it."""
        return read_log(self.path / file, needed=("step",))

    def new_tokens(self) -> int:
        """Longest completion in training."""
        from rlhf_recipes.evaluation.evaluator import longest_in_training

        return longest_in_training(self.recipe, (self.stage,))

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The run's own; of an unfinished run, that of the policy it started from."""
        from rlhf_recipes.data.tokenizer import load_tokenizer

        return load_tokenizer(self.recipe, self.stage, str(self.path) if self.is_finished else self.settings.policy)

    def models(self) -> list[Model]:
        """The policy at the start, every whole checkpoint, and the final model, by step."""
        whole = [path for path in checkpoints(self.path) if (path / MARKER).is_file()]
        last = max([0, *(line["step"] for line in self.logged(METRICS)), *map(step_of, whole)])
        if self.is_finished:
            whole = [path for path in whole if step_of(path) < last]  # the final model is that of the last step
        found = [Model(START, 0, self.settings.policy)]
        found += [Model(path.name, step_of(path), str(path)) for path in whole]
        return found + ([Model("final", last, str(self.path))] if self.is_finished else [])


def open_run(path: Path) -> AuditedRun:
    """Opens the run in a folder.

    Raises:
        RecipeError: The folder holds no run of ppo or rloo.
    """
    manifest = read_manifest(path)
    if manifest is None or manifest["stage"] not in ON_POLICY:
        what = "is no run" if manifest is None else f"is a run of stage {manifest['stage']}"
        raise RecipeError(f"{path} {what}; name the folder of a run of ppo or rloo, such as runs/imdb_tiny/ppo.")
    folder = path.resolve()
    recipe = load_recipe(str(folder / "recipe.yaml"))
    # The folder may have been moved since: its `stage:sft` is the folder beside it now.
    recipe = recipe.model_copy(update={"runs_dir": str(folder.parent.parent), "name": folder.parent.name})
    return AuditedRun(folder, manifest["stage"], recipe, manifest)
