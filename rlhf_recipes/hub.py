"""The Hugging Face Hub, or its absence: which references of a recipe need it, and a clear word within seconds."""

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from rlhf_recipes.config import Recipe, RecipeError
from rlhf_recipes.data import is_local
from rlhf_recipes.run import eval_models

SECONDS_TO_ANSWER = 5


def hub_references(recipe: Recipe, stage: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> (Hub id, "model" or "dataset") of everything that a stage would fetch."""
    found = {}
    if stage != "compare":
        found["data.path"] = (recipe.data.path, "dataset")
    section = getattr(recipe, stage, None)
    for key in ("model", "policy"):
        if getattr(section, key, None) is not None:
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
    return {
        key: (reference, kind)
        for key, (reference, kind) in found.items()
        if not reference.startswith(("stage:", "package:")) and not is_local(reference)
    }


def prepare_hub(recipe: Recipe, stage: str) -> None:
    """Make sure that everything a stage would fetch can be had; without network, only from the local cache.

    Call before anything of Hugging Face is imported: without network this sets `HF_HUB_OFFLINE`, which its libraries
    read when they are imported, so that none of them retries for a minute.

    Raises:
        RecipeError: The Hub does not answer, and something is not in the cache; says which keys to set.
    """
    references = hub_references(recipe, stage)
    if not references or not (os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or not _reachable()):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    missing = [f"  {key}: {ref}" for key, (ref, kind) in references.items() if not _is_cached(ref, kind)]
    if missing:
        raise RecipeError(
            f"the Hugging Face Hub cannot be reached ({_endpoint()}), and these are not in the local cache:\n"
            + "\n".join(missing)
            + "\nSet each key to a local folder or file, such as "
            + f"{next(iter(references))}=./my-copy, or run once with network."
        )


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
