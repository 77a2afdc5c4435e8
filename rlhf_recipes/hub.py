"""What a stage refers to, data and models: checked before anything heavy is imported, with or without the Hub."""

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from rlhf_recipes.config import Recipe, RecipeError
from rlhf_recipes.data import is_local, locate_data
from rlhf_recipes.models import resolve_model
from rlhf_recipes.run import eval_models

SECONDS_TO_ANSWER = 5

OWN_VALUE_MODELS = ("shared", "policy")
"""Values of `ppo.value_model` that refer to the policy itself."""


def references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> (reference, "model" or "dataset") of everything that a stage loads."""
    found = {}
    own_pairs = recipe.reward.data if stage == "reward" and recipe.reward is not None else None
    if own_pairs is not None:
        found["reward.data.path"] = (own_pairs.path, "dataset")
    if stage != "compare" and (own_pairs is None or recipe.reward.center == "reference"):
        found["data.path"] = (recipe.data.path, "dataset")
    section = getattr(recipe, stage, None)
    for key in ("model", "policy", "value_model"):
        if getattr(section, key, None) not in (None, *OWN_VALUE_MODELS):
            found[f"{stage}.{key}"] = (getattr(section, key), "model")
    if stage == "eval":
        found |= {f"eval.models.{name}": (reference, "model") for name, reference in eval_models(recipe).items()}
    funcs = {"reward_funcs": recipe.reward_funcs} if stage in ("ppo", "rloo", "eval") else {}
    if stage == "eval":
        funcs["eval.judge_funcs"] = recipe.eval.judge_funcs
    for key, specs in funcs.items():
        for i, spec in enumerate(specs):
            model = spec.args.get("model")
            if spec.name in ("sentiment", "reward_model") and isinstance(model, str):
                found[f"{key}.{i}.args.model"] = (model, "model")
    return found


def hub_references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """Those of `references` that are Hub ids."""
    return {
        key: (reference, kind)
        for key, (reference, kind) in references(recipe, stage).items()
        if not reference.startswith(("stage:", "package:")) and not is_local(reference)
    }


def check_references(recipe: Recipe, stage: str) -> None:
    """Make sure that everything a stage loads is there; without network, Hub ids only from the local cache.

    Call before anything of Hugging Face is imported: without network this sets `HF_HUB_OFFLINE`, which its libraries
    read when they are imported, so that none of them retries for a minute.

    Raises:
        RecipeError: A file, folder or stage is missing, or the Hub does not answer and something is not in its cache;
            every finding, with the keys to set.
    """
    from_hub = hub_references(recipe, stage)
    findings = []
    for key, (reference, kind) in references(recipe, stage).items():
        try:
            if key not in from_hub:
                locate_data(key, reference) if kind == "dataset" else resolve_model(recipe, key, reference)
        except RecipeError as error:
            findings.append(str(error))
    if from_hub and (os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or not _reachable()):
        os.environ["HF_HUB_OFFLINE"] = "1"
        missing = {key: reference for key, (reference, kind) in from_hub.items() if not _is_cached(reference, kind)}
        if missing:
            findings.append(
                f"the Hugging Face Hub cannot be reached ({_endpoint()}), and these are not in the local cache:\n"
                + "".join(f"  {key}: {reference}\n" for key, reference in missing.items())
                + f"Set each key to a local folder or file, such as {next(iter(missing))}=./my-copy, or run once with network."
            )
    if findings:
        raise RecipeError("\n".join(findings))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _reachable() -> bool:
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
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return (cache / f"{kind}s--{reference.replace('/', '--')}" / "snapshots").is_dir()
