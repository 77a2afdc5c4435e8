"""Decides what a recipe may do: which code it runs, and whether it uploads (`docs/security.md`)."""

import os
import re
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.load import named_folders, shipped_recipes
from rlhf_recipes.recipe.named_files import announce
from rlhf_recipes.recipe.schema import TRAINED, Recipe, RecipeError

ALLOWED = "RLHF_RECIPES_ALLOW_CODE"
"""Environment variable with packages, files and folders that the user trusts, separated by commas."""

INSTALLED = re.compile(r"[\\/]((site|dist)-packages|lib\d*[\\/]python[\d.]+)[\\/]")
"""Path of an installed package, even one in an environment below the current folder: the user did not write it."""

UPLOADS = ("push_to_hub", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
"""Keys of a trainer that make a repository or Space on the Hub."""


def trust_file() -> Path:
    """The user's own list of trusted packages, files and folders, one a line."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "rlhf_recipes" / "trusted.txt"


def trusted() -> list[str]:
    """What the user trusts: packages, Hub models, and full paths of files and folders."""
    file = trust_file()
    listed = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [entry.strip() for entry in (*listed, *os.environ.get(ALLOWED, "").split(",")) if entry.strip()]


def add_trusted(names: list[str]) -> None:
    """Add packages, files, folders and Hub models to the user's list.

    Raises:
        RecipeError: A name is none of these.
    """
    entries = []
    for name in names:
        path = Path(name).expanduser().resolve()
        is_path = (os.sep in name or name.endswith(".py")) and path.exists()
        if not is_path and (name.endswith(".py") or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)):
            raise RecipeError(f"trust {name}: this is no package, no model of the Hub and no existing file or folder.")
        entries.append(str(path) if is_path else name)
    if new := [entry for entry in entries if not is_trusted(entry)]:
        trust_file().parent.mkdir(parents=True, exist_ok=True)
        with open(trust_file(), "a", encoding="utf-8") as file:
            file.writelines(f"{entry}\n" for entry in new)


def is_trusted(name: str) -> bool:
    """Whether the user trusts a module, a Hub model or a full path: it is listed, or a package or folder around it is."""
    return any(
        name == entry or name.startswith(entry + (os.sep if os.path.isabs(entry) else ".")) for entry in trusted()
    )


def may_run(path: Path) -> bool:
    """Whether a file or folder may run: the user trusts it, or it is beside the recipe or below the current folder.

    A symbolic link there counts as a file there: a person who can place a link can also place a file. A link to an
    installed package does not count.
    """
    target, path = path.resolve(), Path(os.path.abspath(path))
    if target.is_relative_to(shipped_recipes().resolve()) or is_trusted(str(target)) or is_trusted(str(path)):
        return True
    return not INSTALLED.search(f"{target}{os.sep}") and any(
        one.is_relative_to(os.path.abspath(folder)) or one.is_relative_to(Path(folder).resolve())
        for folder in own_folders()
        for one in (path, target)
    )


def own_folders() -> list[str]:
    """The current folder, and those of recipes: the places of the user's own modules."""
    return [str(Path.cwd()), *named_folders()]


def own_code(recipe: Recipe) -> dict[str, str]:
    """Dotted key -> every model, and every kernel of the Hub, whose own code a recipe wants to run."""
    found = {f"trust_remote_code.{i}": m for i, m in enumerate(recipe.trust_remote_code) if not m.startswith("stage:")}
    for stage in TRAINED:
        given = getattr(getattr(recipe, stage), "trainer", {}).get("model_init_kwargs") or {}
        if given.get("allow_all_kernels"):
            found[f"{stage}.trainer.model_init_kwargs"] = str(given.get("attn_implementation"))
    return found


def runs_own_code(recipe: Recipe, model_id: str) -> bool:
    """Whether a model's own Python code runs, which is announced: the recipe names the model, and the user trusts it.

    Raises:
        RecipeError: The recipe names it, but the user does not trust it.
    """
    if model_id not in recipe.trust_remote_code:
        return False
    stage = model_id.partition("stage:")[2]
    place = str(Path(recipe.runs_dir, recipe.name, stage).absolute()) if stage else model_id
    require_trusted_model("trust_remote_code", place)
    announce(f"a model's own code runs: {place}")
    return True


def require_trusted_model(key: str, model_id: str) -> None:
    """Refuse to run the Python code of a model from elsewhere that the user does not trust."""
    folder = Path(os.path.expanduser(model_id))
    name = model_id.partition("@")[0]
    if not (may_run(folder) if folder.is_absolute() or os.path.exists(folder) else is_trusted(name)):
        raise RecipeError(f"{key}: {model_id} brings code, and {how_to_trust(name)}")


def how_to_trust(entry: Any) -> str:
    return (
        "a recipe alone may not run code that is neither beside it nor below the current folder. Read the code; if you "
        f"trust it, give: rlhf-recipes trust {entry} (or set {ALLOWED}={entry})."
    )


def refuse_uploads(recipe: Recipe, stages: list[str], push: bool) -> None:
    """Refuse a recipe that uploads to the Hub unless the user's command says so too.

    Raises:
        RecipeError: Names the key.
    """
    for stage in stages:
        given = getattr(getattr(recipe, stage, None), "trainer", {})
        if not push and (keys := [key for key in UPLOADS if given.get(key)]):
            raise RecipeError(
                f"{stage}.trainer.{keys[0]}: a recipe alone uploads nothing. Add --push to the command of run or of the "
                f"stage (sweep and duel never upload), or take the key out: {stage}.trainer.{keys[0]}=null."
            )
