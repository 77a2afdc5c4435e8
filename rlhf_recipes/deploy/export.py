"""Exports a finished run: a folder with the model for plain `from_pretrained`, and a card with its origin."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_recipes.deploy.card import CARD, model_card, start_of
from rlhf_recipes.models.load import adapter_of, base_of, load_config, load_model
from rlhf_recipes.recipe.schema import TRAINED, RecipeError
from rlhf_recipes.recipe.trust import require_trusted_model
from rlhf_recipes.runs.files import MANIFEST, MERGED_BASE, REWARD_REPORT, VALUE_MODEL, read_manifest
from rlhf_recipes.runs.inputs import go_offline
from rlhf_recipes.runs.references import SNAPSHOT, WEIGHTS, is_hub_model, loading
from rlhf_recipes.system.files import read_json, writing
from rlhf_recipes.system.terminal import hush_libraries, log_to, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["bfloat16", "float16", "float32"]

ADAPTER = "adapter_config.json"

NOT_EXPORTED = (MANIFEST, REWARD_REPORT, "log.txt")
"""Files of a run folder that match `SNAPSHOT` and do not belong to the model."""

SHARD = "5GB"
"""Largest file of weights; transformers' default, 50 GB, is too large for some file systems and uploads."""


def export_run(run: Path, out: Path | None, merge: bool, dtype: Dtype | None) -> Path:
    """Write the model of a finished run, its tokenizer and a model card to a folder, and print what the model needs.

    The folder is either complete or does not exist.

    Args:
        run: Folder of a finished run of sft, reward, ppo or rloo. It may have been moved.
        out: New or empty folder. None: `export-<stage>` beside the run, or `export-<stage>-merged`.
        merge: Whether an adapter is merged into its base. A whole model is exported as it is.
        dtype: The dtype of the exported weights. None: their own; for merged weights, the base's.

    Returns:
        The folder that was written.

    Raises:
        RecipeError: No run has finished, `out` is in use or in the run, a base is missing, or weights overflow in `dtype`.
    """
    manifest = _finished(run)
    adapter = read_json(run / ADAPTER) if (run / ADAPTER).is_file() else None
    if adapter is not None and dtype is not None and not merge:
        raise RecipeError(f"--dtype: {run} holds an adapter, which is small and is exported as it is; add --merge.")
    for path in run.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(run.resolve()):
            raise RecipeError(
                f"{path} is a link to {path.resolve()}, outside of the run: the export would publish that file."
            )
    out = out or run.resolve().parent / f"export-{manifest['stage']}{'-merged' if adapter and merge else ''}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out: {out} exists already; name a new folder, or move that one away.")
    if out.resolve().is_relative_to(run.resolve()):  # a run's own base/ and value_model/ must stay
        raise RecipeError(f"--out: {out} is inside the run; name a folder elsewhere.")
    log_to(None)
    if adapter is not None and is_hub_model(adapter["base_model_name_or_path"] or ""):
        go_offline()
    with writing("the export", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as hidden:
            part = Path(hidden) / out.name
            part.mkdir()
            notes = _write(run, manifest, adapter, part, merge, dtype)
            written = read_json(part / ADAPTER) if (part / ADAPTER).is_file() else None
            (part / CARD).write_text(model_card(run, manifest, written, notes), encoding="utf-8")
            if out.exists():
                out.rmdir()
            part.rename(out)
    for note in notes:
        say(note)
    say(f"exported to {out}")
    return out


def _finished(run: Path) -> dict[str, Any]:
    """The manifest of a run that has finished with a model."""
    manifest = read_manifest(run)
    if manifest is None:
        inside = sorted(path.parent.name for path in run.glob(f"*/{MANIFEST}"))
        found = f"no {MANIFEST} in it" if run.is_dir() else "no such folder"
        there = f"it contains the runs: {', '.join(inside)}" if inside else "name one such as runs/imdb_tiny/ppo"
        raise RecipeError(f"{run} is no run ({found}); {there}.")
    if manifest["stage"] not in TRAINED:
        raise RecipeError(f"{run}: stage {manifest['stage']} trains no model, so there is nothing to export.")
    if manifest["status"] != "finished":
        raise RecipeError(
            f"{run} has not finished (its {MANIFEST} says {manifest['status']}), so it has no final model yet; "
            "give its command again."
        )
    if not any(run.glob(WEIGHTS)):
        raise RecipeError(f"the weights of {run} are gone ({WEIGHTS}); run its stage again.")
    return manifest


def _write(
    run: Path, manifest: dict[str, Any], adapter: dict[str, Any] | None, part: Path, merge: bool, dtype: Dtype | None
) -> list[str]:
    """Write all files but the model card; returns sentences that describe the export."""
    stage, notes = manifest["stage"], []
    files = {path for pattern in SNAPSHOT for path in run.glob(pattern) if path.name not in NOT_EXPORTED}
    if dtype is not None or (adapter is not None and merge):  # then weights are written below
        files -= {run / ADAPTER, *_weights(run)}
    for path in sorted(files | {run / "recipe.yaml"}):
        shutil.copy(path, part)
    trusted = start_of(manifest) in manifest["settings"].get("trust_remote_code", [])
    if trusted:
        require_trusted_model("export", str(run))
    quantization = manifest["settings"][stage].get("quantization")
    if adapter is None:
        if dtype is not None:
            _convert(stage, run, part, dtype, trusted)
        notes.append("a whole model" + (", trained as a whole, so there is nothing to merge" if merge else ""))
    elif merge:
        base, stored = _merge(stage, run, part, dtype, trusted)
        notes.append(f"a whole model: the adapter merged into {base}, in {stored}")
    else:
        notes.append(_take_along(run, adapter, part))
    if quantization is not None:
        settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in sorted(quantization.items()))
        merged = "and merged into unquantized ones, so its logits differ a little from those in training"
        alone = "so load its base with that as quantization_config to get the logits of the training"
        notes.append(f"trained on quantized weights ({settings}), {merged if merge else alone}")
    if (run / VALUE_MODEL).is_dir():
        if dtype is not None and (run / VALUE_MODEL / "config.json").is_file():
            weights = [path.name for path in _weights(run / VALUE_MODEL)]
            shutil.copytree(run / VALUE_MODEL, part / VALUE_MODEL, ignore=shutil.ignore_patterns(*weights))
            _convert("reward", run / VALUE_MODEL, part / VALUE_MODEL, dtype, trusted=False)
        else:
            shutil.copytree(run / VALUE_MODEL, part / VALUE_MODEL)
        notes.append(f"with its value network in {VALUE_MODEL}/")
    return notes


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob(WEIGHTS), *folder.glob("*.index.json")]


def _take_along(run: Path, adapter: dict[str, Any], part: Path) -> str:
    """Copy the base beside an exported adapter, or write the base's place into it; returns what the adapter needs."""
    name = adapter["base_model_name_or_path"]
    if (run / MERGED_BASE).is_dir():
        shutil.copytree(run / MERGED_BASE, part / MERGED_BASE)
        return f"an adapter; it needs its base, which is in {MERGED_BASE}/ beside it (--merge makes one whole model)"
    if is_hub_model(name or ""):
        return f"an adapter; it needs its base, {name} of the Hub (--merge makes one whole model)"
    base = str(Path(base_of("export", str(run), adapter_of("export", str(run)))).resolve())
    (part / ADAPTER).write_text(json.dumps(adapter | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")
    return (
        f"an adapter; it needs its base, the local folder {base}: on another machine, copy that folder too and set "
        f"base_model_name_or_path in {ADAPTER}, or export with --merge, which makes one whole model"
    )


def _merge(stage: str, run: Path, part: Path, dtype: Dtype | None, trusted: bool) -> tuple[str, str]:
    """Write adapter and base as one model; returns the base's name and the dtype of the weights."""
    from transformers import AutoTokenizer
    from transformers.trainer_utils import align_special_tokens

    hush_libraries()
    name = read_json(run / ADAPTER)["base_model_name_or_path"]
    base = base_of("export", str(run), adapter_of("export", str(run)))
    stored = dtype or str(load_config("export", base, trusted).dtype or "float32").removeprefix("torch.")
    # In float32, so that the sum of base and adapter is rounded only once.
    model = load_model(_auto_class(stage), "export", str(run), trusted, dtype="float32")
    # As TRL's trainers do: the model's special tokens become those of the tokenizer.
    align_special_tokens(model, AutoTokenizer.from_pretrained(run, trust_remote_code=trusted))
    for path in Path(base).glob("*.py"):
        shutil.copy(path, part)
    _save(model, part, stored)
    return f"{name} of the Hub" if is_hub_model(name or "") else base, stored


def _convert(stage: str, source: Path, part: Path, dtype: Dtype, trusted: bool) -> None:
    """Write a whole model with weights in another dtype."""
    hush_libraries()
    model = load_model(_auto_class(stage), "export", str(source), trusted, dtype="float32")
    _save(model, part, dtype)


def _save(model: "PreTrainedModel", part: Path, dtype: str) -> None:
    import torch

    model.to(getattr(torch, dtype))
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise RecipeError(f"export: {name} has weights that are not finite in {dtype}; take --dtype float32.")
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = True
    with loading("export", model.config.name_or_path):
        model.save_pretrained(part, max_shard_size=SHARD)


def _auto_class(stage: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
