"""What a stage refers to, data and models: checked before anything heavy is imported, with or without the Hub."""

import os
import re
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.graph import eval_models
from rlhf_recipes.recipe.load import code_file
from rlhf_recipes.recipe.schema import Data, Eval, OnPolicy, Recipe, RecipeError, RewardFunc
from rlhf_recipes.runs.files import read_manifest
from rlhf_recipes.runs.references import (
    hub_arguments,
    hub_cache,
    is_hub_model,
    is_local,
    is_offline,
    locate_data,
    resolve_model,
)
from rlhf_recipes.system.files import sha256_of

SECONDS_TO_ANSWER = 5

HASHED_BYTES = 100 * 2**20
"""Of data files up to this size the manifest has the sha256, of larger ones size and time of change."""

OPTIMIZERS = (
    (r"^paged_|bnb|^ademamix|^lion|^adamw_8bit", "bitsandbytes", "bitsandbytes (rlhf-recipes[quantization])"),
    (r"^adamw_torch_[48]bit$", "torchao", "torchao"),
    (r"^galore_", "galore_torch", "galore-torch"),
    (r"^apollo_", "apollo_torch", "apollo-torch"),
    (r"lomo$", "lomo_optim", "lomo-optim"),
    (r"^grokadamw$", "grokadamw", "grokadamw"),
    (r"^schedule_free_", "schedulefree", "schedulefree"),
    (r"^stable_adamw$", "optimi", "torch-optimi"),
    (r"^adamw_anyprecision$", "torchdistx", "torchdistx"),
    (r"^adamw_torch_xla$", "torch_xla", "torch-xla"),
    (r"^adamw_torch_npu_fused$", "torch_npu", "torch-npu"),
)
"""Of transformers' optimizers that are not torch's own: what their names look like, the module, what to install."""

OWN_VALUE_MODELS = ("shared", "policy")
"""Values of `ppo.value_model` that refer to the policy itself."""


def references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> (reference, "model" or "dataset") of everything that a stage loads."""
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
    """Dotted key of its path -> every data section that a stage loads."""
    own = recipe.reward.data if stage == "reward" else None
    found = {} if own is None else {"reward.data.path": own}
    if stage != "compare" and (own is None or recipe.reward.center == "reference"):
        found["data.path"] = recipe.data
    return found


def hub_references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """Those of `references` that are Hub ids."""
    return {
        key: (reference, kind)
        for key, (reference, kind) in references(recipe, stage).items()
        if (
            is_hub_model(reference)
            if kind == "model"
            else not reference.startswith("package:") and not is_local(reference)
        )
    }


def check_packages(recipe: Recipe, stage: str) -> None:
    """Make sure that the packages are installed that a stage's settings ask for, before it downloads anything.

    Raises:
        RecipeError: One is not.
    """
    section = getattr(recipe, stage, None)
    given = getattr(section, "trainer", {})
    if getattr(section, "quantization", None) is not None and find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"{stage}.quantization: bitsandbytes is not installed: pip install 'rlhf-recipes[quantization]'"
        )
    if given.get("use_vllm") and find_spec("vllm") is None:
        raise RecipeError(
            f"{stage}.trainer.use_vllm: vLLM is not installed: pip install 'trl[vllm]', or leave it out to sample with "
            "transformers."
        )
    if given.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise RecipeError(
            f"{stage}.trainer.use_liger_kernel: liger-kernel is not installed; install it, or leave it out."
        )
    for names, module, package in OPTIMIZERS:
        if re.search(names, str(given.get("optim"))) and find_spec(module) is None:
            raise RecipeError(
                f"{stage}.trainer.optim: {given['optim']} needs {package}, which is not installed; install it, or take "
                "another, such as adamw_torch."
            )


def go_offline() -> None:
    """Set `HF_HUB_OFFLINE` where the Hub, which is needed, does not answer.

    Call before anything of Hugging Face is imported: its libraries read it when they are, and none then retries for a
    minute.
    """
    if not is_offline() and not is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def check_references(recipe: Recipe, stage: str) -> None:
    """Make sure that everything a stage loads is there, and download its models; without network, from the cache only.

    Raises:
        RecipeError: A file, folder or stage is missing, a model has no safetensors, or the Hub does not answer and
            something is not in its cache; every finding, with the keys to set.
    """
    from_hub = hub_references(recipe, stage)
    if from_hub:
        go_offline()
    missing = {}
    if from_hub and is_offline():
        missing = {key: reference for key, (reference, kind) in from_hub.items() if not _is_cached(reference, kind)}
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
            f"the Hugging Face Hub cannot be reached ({_endpoint()}), and these are not in the local cache:\n"
            + "".join(f"  {key}: {reference}\n" for key, reference in missing.items())
            + f"Set each key to a local folder or file, such as {next(iter(missing))}=./my-copy, or run once with network."
        )
    if findings:
        raise RecipeError("\n".join(findings))


def sources(recipe: Recipe, stage: str) -> dict[str, dict[str, Any]]:
    """Dotted key -> which files are behind each of `references`, once `check_references` has found them.

    Each has `reference`, `path` and `revision`: the commit on the Hub, or the id of a run; None for local files, of
    which one file of data has its `sha256` (or, when it is large, `bytes` and `modified`), as has a file of own functions.

    Raises:
        RecipeError: A data set cannot be had, or not at the revision that the recipe pins.
    """
    found = {}
    for key, (reference, kind) in references(recipe, stage).items():
        source = (
            _model_source(recipe, key, reference) if kind == "model" else _data_source(key, _data(recipe, stage)[key])
        )
        found[key] = {"reference": reference} | source
    for key, name in _own_code(recipe, stage).items():
        path = code_file(name.rpartition(":")[0])
        if path.is_file():  # or the stage says so, when it looks for the function
            checksum = sha256_of(path)
            found[key] = {"reference": name, "revision": None, "path": str(path), "sha256": checksum}
    return found


def _own_code(recipe: Recipe, stage: str) -> dict[str, str]:
    """Dotted key -> `path/to/file.py:function` of what a stage takes from the user's own files."""
    named = {f"{key}.name": spec.name for key, spec in _reward_funcs(recipe, stage).items()}
    named |= {key.removesuffix("path") + "transform": data.transform for key, data in _data(recipe, stage).items()}
    return {key: name for key, name in named.items() if name and ".py:" in name}


def _model_source(recipe: Recipe, key: str, reference: str) -> dict[str, Any]:
    folder = Path(resolve_model(recipe, key, reference)).absolute()
    if is_hub_model(reference):
        revision = folder.name  # snapshots/<commit>
    else:
        revision = (read_manifest(folder) or {}).get("id")
    return {"revision": revision, "path": str(folder)}


def _data_source(key: str, data: Data) -> dict[str, Any]:
    path = locate_data(key, data.path)
    if path is None:
        return _hub_data_source(key, data)
    source = {"revision": None, "path": str(path.absolute())}
    if path.is_file():
        size = path.stat().st_size
        if size <= HASHED_BYTES:
            source["sha256"] = sha256_of(path)
        else:
            source |= {"bytes": size, "modified": path.stat().st_mtime}
    return source


def _hub_data_source(key: str, data: Data) -> dict[str, Any]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(**hub_arguments(data))
    except Exception as error:  # datasets raises many types, for unknown ids as for unknown configurations
        raise RecipeError(
            f"{key}: {data.path} is not to be had ({type(error).__name__}: {str(error)[:300]})."
        ) from error
    # Without network, datasets takes the latest of its cache, whatever revision is asked for.
    if is_offline() and data.revision is not None and builder.hash != _commit(data.path, "dataset", data.revision):
        raise RecipeError(
            f"{key}: the local cache has {data.path} at {builder.hash}, not at the pinned revision {data.revision}, and the "
            f"Hugging Face Hub cannot be reached. Run once with network, or set {key.removesuffix('path')}revision={builder.hash}."
        )
    return {"revision": builder.hash, "path": builder.cache_dir}


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def is_reachable() -> bool:
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(_endpoint(), method="HEAD"), timeout=SECONDS_TO_ANSWER)
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answered.set()

    # Name resolution has no time-out of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return answered.is_set()


def _is_cached(reference: str, kind: str) -> bool:
    name, _, revision = reference.partition("@")
    snapshots = _cached(name, kind) / "snapshots"
    return (snapshots / _commit(name, kind, revision or "main")).is_dir() if kind == "model" else snapshots.is_dir()


def _commit(name: str, kind: str, revision: str) -> str:
    """The commit that the cache knows a branch or tag by; otherwise `revision` is taken for a commit itself."""
    ref = _cached(name, kind) / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision


def _cached(name: str, kind: str) -> Path:
    return hub_cache() / f"{kind}s--{name.replace('/', '--')}"
