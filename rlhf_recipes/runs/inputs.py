"""The data, models and runs that a stage reads. They are checked before heavy imports, with or without the Hub."""

import os
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.graph import eval_models, input_stages
from rlhf_recipes.recipe.load import named_file
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.sections import Data, RewardFunc
from rlhf_recipes.recipe.stages import Eval, OnPolicy
from rlhf_recipes.runs.files import MANIFEST, is_finished, read_manifest, run_path
from rlhf_recipes.runs.references import (
    GGUF,
    cached_commit,
    gguf_file,
    hub_arguments,
    is_cached,
    is_hub_model,
    is_offline,
    is_on_hub,
    locate_data,
    resolve_model,
)
from rlhf_recipes.system.files import sha256_of

SECONDS_TO_ANSWER = 5

HASHED_BYTES = 100 * 2**20
"""The manifest has the sha256 of data files up to this size; size and time of change of larger ones."""

PACKAGES = {
    "quantization": ("bitsandbytes", "pip install 'rlhf-recipes[quantization]'"),
    "trainer.use_vllm": ("vllm", "pip install 'trl[vllm]', or remove the key to sample with transformers"),
    "trainer.use_liger_kernel": ("liger_kernel", "pip install liger-kernel, or remove the key"),
}
"""A stage's setting -> the package that it needs, and a remedy."""

OWN_VALUE_MODELS = ("shared", "policy")
"""Values of `ppo.value_model` that mean the policy itself."""


def references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> (reference, "model" or "dataset") of all models and data that a stage loads."""
    found = {key: (data.path, "dataset") for key, data in _data(recipe, stage).items()}
    section = getattr(recipe, stage, None)
    for key in ("model", "policy", "value_model"):
        if getattr(section, key, None) not in (None, *OWN_VALUE_MODELS):
            found[f"{stage}.{key}"] = (getattr(section, key), "model")
    if stage == "eval":
        found |= {f"eval.models.{name}": (reference, "model") for name, reference in eval_models(recipe).items()}
        if recipe.eval.perplexity_model is not None:
            found["eval.perplexity_model"] = (recipe.eval.perplexity_model, "model")
    for key, spec in _reward_funcs(recipe, stage).items():
        model = spec.args.get("model")
        if spec.name in ("sentiment", "reward_model") and isinstance(model, str):
            found[f"{key}.args.model"] = (model, "model")
    return found


def _reward_funcs(recipe: Recipe, stage: str) -> dict[str, RewardFunc]:
    """Dotted key -> every reward function that a stage calls."""
    lists = {"reward_funcs": recipe.reward_funcs} if isinstance(getattr(recipe, stage, None), (OnPolicy, Eval)) else {}
    lists |= {"eval.held_out_funcs": recipe.eval.held_out_funcs} if stage == "eval" else {}
    return {f"{key}.{i}": spec for key, specs in lists.items() for i, spec in enumerate(specs)}


def _data(recipe: Recipe, stage: str) -> dict[str, Data]:
    """Dotted key of the path -> every data section that a stage loads."""
    reward = recipe.reward if stage == "reward" else None
    own = reward and reward.data
    found = {"reward.data.path": own} if own else {}
    if stage != "compare" and (not own or (reward and reward.center == "gold")):
        found["data.path"] = recipe.data
    return found


def hub_references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """The `references` that are Hub ids."""
    found = references(recipe, stage)
    return {key: (name, kind) for key, (name, kind) in found.items() if is_on_hub(name, kind)}


def input_ids(recipe: Recipe, stage: str) -> dict[str, str | None]:
    """Every run that a stage builds on -> its id; None: it has not finished.

    Stages of the recipe go by name. Runs elsewhere, which only eval measures, go by path.
    """
    found = {name: run_path(recipe, name) for name in input_stages(recipe, stage)}
    if stage == "eval":
        named = [*eval_models(recipe).values(), recipe.eval.perplexity_model]
        found |= {path: Path(path) for path in named if path and os.path.isfile(Path(path) / MANIFEST)}
    return {name: (read_manifest(path) or {}).get("id") if is_finished(path) else None for name, path in found.items()}


def check_packages(recipe: Recipe, stage: str) -> None:
    """Refuse settings whose packages are not installed, before anything is downloaded."""
    section = getattr(recipe, stage, None)
    given = {"quantization": getattr(section, "quantization", None)}
    given |= {f"trainer.{key}": value for key, value in getattr(section, "trainer", {}).items()}
    for key, (module, remedy) in PACKAGES.items():
        if given.get(key) and find_spec(module) is None:
            raise RecipeError(f"{stage}.{key}: {module} is not installed: {remedy}")


def go_offline() -> None:
    """Set `HF_HUB_OFFLINE` if the Hub does not answer, so that no library retries for a minute.

    Call it before any Hugging Face library is imported: they read the variable at import.
    """
    if not is_offline() and not is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def check_references(recipe: Recipe, stage: str) -> None:
    """Check that everything a stage loads exists, and download its models. Without network, only the cache counts.

    Raises:
        RecipeError: A file, folder or stage is missing, a model has no safetensors, or the Hub does not answer and
            the cache lacks something. The message has every finding, with the keys to set.
    """
    from_hub = hub_references(recipe, stage)
    if from_hub:
        go_offline()
    missing = {}
    if from_hub and is_offline():
        missing = {key: reference for key, (reference, kind) in from_hub.items() if not is_cached(reference, kind)}
    findings = []
    for key, (reference, kind) in references(recipe, stage).items():
        try:
            if kind == "model" and key not in missing:
                resolve_model(recipe, key, reference)
            elif key not in from_hub:
                locate_data(key, reference)
        except RecipeError as error:
            findings.append(str(error))
    if missing:
        findings.append(
            f"the Hugging Face Hub cannot be reached ({_endpoint()}), and the local cache lacks:\n"
            + "".join(f"  {key}: {reference}\n" for key, reference in missing.items())
            + f"Set each key to a local folder or file, such as {next(iter(missing))}=./my-copy, or run once with network."
        )
    if findings:
        raise RecipeError("\n".join(findings))


def sources(recipe: Recipe, stage: str) -> dict[str, dict[str, Any]]:
    """Dotted key -> the files that each of `references` stands for. Call `check_references` first.

    Each has `reference`, `path` and `revision`: a commit of the Hub, the id of a run, or None for local files. A data
    file and a file of user functions also have a `sha256`; a large data file has `bytes` and `modified` instead.

    Raises:
        RecipeError: A data set cannot be loaded, or not at the revision that the recipe pins.
    """
    found = {}
    data = _data(recipe, stage)
    for key, (reference, kind) in references(recipe, stage).items():
        source = _model_source(recipe, key, reference) if kind == "model" else _data_source(key, data[key])
        found[key] = {"reference": reference} | source
    for key, name in _own_code(recipe, stage).items():
        path = named_file(name.rpartition(":")[0])
        if path.is_file():  # otherwise the stage fails when it looks up the function
            found[key] = {"reference": name, "revision": None, "path": str(path), "sha256": sha256_of(path)}
    return found


def _own_code(recipe: Recipe, stage: str) -> dict[str, str]:
    """Dotted key -> `path/to/file.py:function` of every user function that a stage calls."""
    named: dict[str, str | None] = {f"{key}.name": spec.name for key, spec in _reward_funcs(recipe, stage).items()}
    named |= {key.removesuffix("path") + "transform": data.transform for key, data in _data(recipe, stage).items()}
    return {key: name for key, name in named.items() if name and ".py:" in name}


def _model_source(recipe: Recipe, key: str, reference: str) -> dict[str, Any]:
    if reference.endswith(GGUF):
        file = gguf_file(key, reference)
        commit = file.parts[file.parts.index("snapshots") + 1] if is_hub_model(reference) else None
        return {"revision": commit, "path": str(file.absolute())}
    folder = Path(resolve_model(recipe, key, reference)).absolute()
    run_id = (read_manifest(folder) or {}).get("id")
    return {"revision": folder.name if is_hub_model(reference) else run_id, "path": str(folder)}  # snapshots/<commit>


def _data_source(key: str, data: Data) -> dict[str, Any]:
    path = locate_data(key, data.path)
    if path is None:
        return _hub_data_source(key, data)
    source: dict[str, Any] = {"revision": None, "path": str(path.absolute())}
    if not path.is_file():
        return source
    stat = path.stat()
    if stat.st_size <= HASHED_BYTES:
        return source | {"sha256": sha256_of(path)}
    return source | {"bytes": stat.st_size, "modified": stat.st_mtime}


def _hub_data_source(key: str, data: Data) -> dict[str, Any]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(**hub_arguments(data))
    except Exception as error:  # datasets raises many types, such as for unknown ids and configurations
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise RecipeError(f"{key}: {data.path} is not available ({said}).") from error
    pinned = data.revision and cached_commit(data.path, "dataset", data.revision)
    # Without network, datasets takes the latest revision in its cache, whatever the recipe pins.
    if is_offline() and pinned not in (None, builder.hash):
        raise RecipeError(
            f"{key}: the local cache has {data.path} at {builder.hash}, not at the pinned revision {data.revision}, and the "
            f"Hugging Face Hub cannot be reached. Run once with network, or set {key.removesuffix('path')}revision={builder.hash}."
        )
    return {"revision": builder.hash, "path": builder.cache_dir}


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def is_reachable() -> bool:
    """Whether the Hub answers, with an error or not, within `SECONDS_TO_ANSWER`."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(_endpoint(), method="HEAD"), timeout=SECONDS_TO_ANSWER)
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread, because name resolution has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return answered.is_set()
