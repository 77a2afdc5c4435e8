"""Finds models and data: local paths, `package:NAME/...`, `fetched:NAME`, `stage:NAME`, and ids of the Hugging Face Hub.

In this package, `key` is the key of a model or data set in the recipe, for messages.
"""

import functools
import logging
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf_recipes.recipe.load import DATA_FILES, named_file
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.sections import Data
from rlhf_recipes.runs.fetched import locate_fetched
from rlhf_recipes.runs.files import require_stage
from rlhf_recipes.runs.gguf import unpacked
from rlhf_recipes.system.files import is_disk_error

logger = logging.getLogger(__name__)

FILE_FORMATS = dict(zip(DATA_FILES, ("json", "json", "csv", "parquet"), strict=True))
"""File name ending -> the `datasets` builder that reads it."""

PARQUET = "refs/convert/parquet"
"""Branch of a Hub data set with its rows as Parquet, which the Hub makes by running the data set's script."""

WEIGHTS = "*.safetensors"

GGUF = ".gguf"
"""File name ending of a model in one file, the format of llama.cpp."""

HUB_FILE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?/(?P<file>.+\.gguf)")

PLACES = ("package:", "fetched:")
"""Prefixes of models that lie in an installed package, and in the cache of `rlhf-recipes fetch`."""

SNAPSHOT = [WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""Files of a Hub model to download: weights, configuration, tokenizer and the model's own code; no pickle."""

NOT_IN_SNAPSHOT = [f"*/{WEIGHTS}", "consolidated*"]
"""Copies of the weights in another format."""


def is_local(name: str) -> bool:
    """Whether a name looks like a path or exists as one; otherwise it is a Hub id."""
    looks_like_path = name.startswith((".", "/", "~")) or Path(name).suffix in FILE_FORMATS
    return looks_like_path or name.count("/") > 1 or os.path.exists(name)


def locate_in_package(key: str, name: str) -> Path:
    """The file or folder of `package:NAME/FILE`. The package is located, not imported.

    Raises:
        RecipeError: The package is not installed, or has no such file.
    """
    package, _, rest = name.removeprefix("package:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None  # `find_spec("a.b")` would run a
    folders = spec and spec.submodule_search_locations
    path = Path(folders[0]) / rest if folders else None
    if path is None or not path.exists():
        raise RecipeError(
            f"{key}: {name} is not installed. Install the packaged data (pip install 'rlhf-recipes[offline]'), or "
            f"set {key} to a local path."
        )
    return path


def locate_data(key: str, name: str) -> Path | None:
    """The local file or folder of a data section; None for a Hub id.

    Raises:
        RecipeError: The path does not exist, or its package is not installed.
    """
    if name.startswith("package:"):
        return locate_in_package(key, name)
    if not is_local(name):
        return None
    path = Path(os.path.expanduser(name))
    path = path if os.path.exists(path) else named_file(name)  # a file beside the recipe
    if not os.path.exists(path):
        raise RecipeError(f"{key}: {name} does not exist (looked from {Path.cwd()}).")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise RecipeError(f"{key}: {path.name} must end in one of {', '.join(FILE_FORMATS)}, or be a folder.")
    return path


def hub_arguments(data: Data) -> dict[str, str | None]:
    """The arguments of `datasets.load_dataset` for a data set of the Hub."""
    config = "data_dir" if data.revision == PARQUET else "name"  # there, a configuration is a folder
    return {"path": data.path, config: data.config, "revision": data.revision}


def resolve_model(recipe: Recipe, key: str, model_id: str) -> str:
    """The folder of a model, as `from_pretrained` takes it; a Hub model is downloaded, and a GGUF file is unpacked.

    A model id is `stage:NAME`, a folder, `package:NAME/FOLDER` in an installed package, `fetched:NAME` after
    `rlhf-recipes fetch NAME`, or a Hub id with or without `@revision` (a branch, tag or commit). A folder or an id
    followed by `/FILE.gguf` names this file.

    Raises:
        RecipeError: The stage has not run, the path or Hub id does not exist, or the model has no safetensors.
    """
    if model_id.startswith("stage:"):
        return str(require_stage(recipe, model_id.removeprefix("stage:"), key))
    if model_id.endswith(GGUF):
        return str(unpacked(key, gguf_file(key, model_id)))
    fix = ""
    if is_hub_model(model_id):
        name, revision, _ = hub_parts(model_id)
        with loading(key, model_id):
            folder = hub_snapshot(name, revision)
        fix = f"Pin a revision that has them, such as {name}@refs/pr/1 of the Hub's converter, or convert it: "
    else:
        folder = local_folder(key, model_id)
        if not model_id.startswith(PLACES):
            fix = "Convert it: "
    if not any(folder.glob(WEIGHTS)):
        raise RecipeError(
            f"{key}: {model_id} has no weights in safetensors. Pickled weights are not loaded: they can run any code. "
            f"{fix}load it where you trust it, save_pretrained() it to a folder, and set {key} to that folder."
        )
    return str(folder)


def local_folder(key: str, model_id: str) -> Path:
    """The folder of a model that is no stage's, no Hub id and no GGUF file.

    Raises:
        RecipeError: There is none, or it has no configuration.
    """
    if model_id.startswith("package:"):
        folder = locate_in_package(key, model_id)
    elif model_id.startswith("fetched:"):
        folder = locate_fetched(key, model_id.removeprefix("fetched:"))
    else:
        folder = Path(os.path.expanduser(model_id))
    if not any(os.path.isfile(folder / name) for name in ("config.json", "adapter_config.json")):
        found = "no such folder" if not os.path.isdir(folder) else "no config.json in it, so it holds no model"
        raise RecipeError(f"{key}: {model_id}: {found} (looked from {Path.cwd()}).")
    return folder


def gguf_file(key: str, model_id: str) -> Path:
    """The GGUF file of a model id that ends in `.gguf`; one of the Hub is downloaded.

    Raises:
        RecipeError: There is no such file.
    """
    if is_hub_model(model_id):
        from huggingface_hub import hf_hub_download

        name, revision, file = hub_parts(model_id)
        where: dict[str, Any] = {"cache_dir": hub_cache(), "local_files_only": is_offline()}
        with loading(key, model_id):
            return Path(hf_hub_download(name, file, revision=revision or "main", **where))
    if model_id.startswith("package:"):
        return locate_in_package(key, model_id)
    path = Path(os.path.expanduser(model_id))
    if not path.is_file():
        raise RecipeError(f"{key}: {model_id} does not exist (looked from {Path.cwd()}).")
    return path


def hub_parts(model_id: str) -> tuple[str, str, str]:
    """Name, revision and GGUF file of a Hub id, `org/name@revision/file.gguf`; what is not said is empty."""
    if file := HUB_FILE.fullmatch(model_id):
        return file["name"], file["revision"] or "", file["file"]
    name, _, revision = model_id.partition("@")
    return name, revision, ""


def is_hub_model(model_id: str) -> bool:
    """Whether a model id names a model of the Hub, with or without `@revision` and a GGUF file."""
    if model_id.startswith(("stage:", *PLACES)) or os.path.exists(model_id):
        return False
    name, _, file = hub_parts(model_id)
    return model_id.endswith(GGUF) == bool(file) and not is_local(name)


def is_on_hub(name: str, kind: str) -> bool:
    """Whether a "model" or a "dataset" is on the Hub."""
    if kind == "model":
        return is_hub_model(name)
    return not name.startswith("package:") and not is_local(name)


def hub_cache() -> Path:
    """The cache folder of huggingface_hub.

    It follows that library's rules without importing it: the import would fix whether it works offline.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def check_cache(error: BaseException, folder: Path, variable: str) -> None:
    """Refuses a cache that cannot be written, if an error is about a file in it, or about a folder above it.

    Raises:
        RecipeError: The error's cause, and the environment variables that name another folder.
    """
    name = getattr(error, "filename", None)
    if isinstance(name, str) and (folder.is_relative_to(name) or Path(name).is_relative_to(folder)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as cause:
            raise RecipeError(
                f"HF_HOME: the cache {folder} cannot be written ({cause.strerror}); set HF_HOME or {variable} to another "
                "folder."
            ) from error


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")


def is_cached(named: str, kind: str) -> bool:
    """Whether the Hub's cache has a "model" at its revision, or any revision of a "dataset"."""
    name, revision, file = hub_parts(named)
    snapshots = _cache_of(name, kind) / "snapshots"
    if kind == "dataset":
        return snapshots.is_dir()
    return (snapshots / cached_commit(name, kind, revision or "main") / file).exists()


def cached_commit(name: str, kind: str, revision: str) -> str:
    """The commit of a branch or tag in the cache; any other `revision` counts as a commit."""
    ref = _cache_of(name, kind) / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision


def _cache_of(name: str, kind: str) -> Path:
    return hub_cache() / f"{kind}s--{name.replace('/', '--')}"


def hub_snapshot(name: str, revision: str) -> Path:
    """Folder with the files of a Hub model; for a model with pickled weights, those of the Hub's conversion."""
    return _snapshot(name, revision, hub_cache(), is_offline())


@functools.cache  # so that one run sees one commit, even if the branch moves
def _snapshot(name: str, revision: str, cache: Path, offline: bool) -> Path:
    # All ranks may call it at once: huggingface_hub locks each file during its download.
    from huggingface_hub import snapshot_download

    how: dict[str, Any] = {
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
    except OSError as error:  # the caller reports that there are no safetensors
        logger.info("%s: the Hub has no conversion to safetensors: %s", name, error)
        return folder
    logger.warning(
        "%s has safetensors only from the Hub's converter, which are used; pin them: %s@%s", name, name, revision
    )
    return Path(snapshot_download(name, revision=revision, **how))


@contextmanager
def loading(key: str, model_id: str, by: str | None = None) -> Iterator[None]:
    """Turns a library's error about the model at `key` into a `RecipeError`; with `by`, only one out of this function."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if isinstance(error, RecipeError) or (by is not None and by not in functions):
            raise
        check_cache(error, hub_cache(), "HF_HUB_CACHE")
        if is_disk_error(error):
            raise
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"{key}: {model_id} brings Python code of its own. Read the code. To run it, name the model: "
                f"trust_remote_code=[{model_id}] (for a reward function: its argument trust_remote_code)."
            ) from error
        raise RecipeError(f"{key}: {model_id} cannot be used: {str(error)[:400]}") from error
