"""A finished run as a folder to keep or to give away: the model as plain `from_pretrained` loads it, and where it is from."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_recipes.deploy.card import CARD, model_card, start_of
from rlhf_recipes.models.load import adapter_of, base_of, load_config, load_model
from rlhf_recipes.recipe.schema import RecipeError
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
"""Largest file of weights; transformers' own default, 50 GB, is more than many a file system and upload takes."""


def export_run(run: Path, out: Path | None, merge: bool, dtype: Dtype | None) -> Path:
    """Write the model of a finished run, its tokenizer and a model card to a folder; say where it is and what it needs.

    The folder is there as a whole or not at all.

    Args:
        run: Folder of a finished run of sft, reward, ppo or rloo, also where it was moved to.
        out: New or empty folder. None: `export-<stage>` beside the run, merged `export-<stage>-merged`.
        merge: Whether an adapter becomes a whole model, together with its base; a whole model stays one.
        dtype: What weights are stored in. None: as they are; merged ones as their base's.

    Returns:
        The folder that was written.

    Raises:
        RecipeError: There is no finished run, `out` is in use or in the run, a base is missing, or the weights do not fit `dtype`.
    """
    manifest = _finished(run)
    adapter = read_json(run / ADAPTER) if (run / ADAPTER).is_file() else None
    if adapter is not None and dtype is not None and not merge:
        raise RecipeError(f"--dtype: {run} holds an adapter, which is small and is exported as it is; add --merge.")
    out = out or run.resolve().parent / f"export-{manifest['stage']}{'-merged' if adapter and merge else ''}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out: {out} is there already; name a new folder, or move that one away.")
    if out.resolve().is_relative_to(run.resolve()):  # base/ and value_model/ of a run mean something
        raise RecipeError(f"--out: {out} is inside of the run; name a folder elsewhere.")
    log_to(None)
    from_hub = adapter is not None and is_hub_model(adapter["base_model_name_or_path"] or "")
    if from_hub:
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
        there = f"in it are the runs: {', '.join(inside)}" if inside else "name one such as runs/imdb_tiny/ppo"
        raise RecipeError(f"{run} is no run ({found}); {there}.")
    if manifest["stage"] not in ("sft", "reward", "ppo", "rloo"):
        raise RecipeError(f"{run}: stage {manifest['stage']} trains no model, so there is nothing to export.")
    if manifest["status"] != "finished":
        raise RecipeError(
            f"{run} has not finished (its {MANIFEST} says {manifest['status']}), so it has no final model yet; "
            "give the run's own command again."
        )
    if not any(run.glob(WEIGHTS)):
        raise RecipeError(f"{run} has no weights any more ({WEIGHTS}); run its stage again.")
    return manifest


def _write(
    run: Path, manifest: dict[str, Any], adapter: dict[str, Any] | None, part: Path, merge: bool, dtype: Dtype | None
) -> list[str]:
    """Write all but the model card; returns sentences on what it is."""
    stage, notes = manifest["stage"], []
    files = {path for pattern in SNAPSHOT for path in run.glob(pattern) if path.name not in NOT_EXPORTED}
    if dtype is not None or (adapter is not None and merge):  # then they are written anew
        files -= {run / ADAPTER, *_weights(run)}
    for path in sorted(files | {run / "recipe.yaml"}):
        shutil.copy(path, part)
    trusted = start_of(manifest) in manifest["settings"].get("trust_remote_code", [])
    quantization = manifest["settings"][stage].get("quantization")
    if adapter is None:
        if dtype is not None:
            _convert(stage, run, part, dtype, trusted)
        notes.append("a whole model" + (", as which it was trained: there is nothing to merge" if merge else ""))
    elif merge:
        base, stored = _merge(stage, run, part, dtype, trusted)
        notes.append(f"a whole model: the adapter merged into {base}, in {stored}")
    else:
        notes.append(_take_along(run, adapter, part))
    if quantization is not None:
        notes.append(
            "trained on quantized weights ("
            + ", ".join(f"{name}: {json.dumps(value)}" for name, value in sorted(quantization.items()))
            + "), "
            + (
                "and merged into unquantized ones: its logits are theirs with the adapter, a little other than in training"
                if merge
                else "so load its base with that as quantization_config to have the logits of the training"
            )
        )
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
    """Have an exported adapter name its base as it is to be found from here; says what the adapter needs."""
    name = adapter["base_model_name_or_path"]
    if (run / MERGED_BASE).is_dir():
        shutil.copytree(run / MERGED_BASE, part / MERGED_BASE)
        return f"an adapter; it needs its base, which is in {MERGED_BASE}/ beside it (--merge makes one whole model)"
    if is_hub_model(name or ""):
        return f"an adapter; it needs its base, {name} of the Hub (--merge makes one whole model)"
    base = str(Path(base_of("export", str(run), adapter_of("export", str(run)))).resolve())
    (part / ADAPTER).write_text(json.dumps(adapter | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")
    return (
        f"an adapter; it needs its base, the local folder {base}: elsewhere, take that along and set "
        f"base_model_name_or_path in {ADAPTER}, or export with --merge, which makes one whole model"
    )


def _merge(stage: str, run: Path, part: Path, dtype: Dtype | None, trusted: bool) -> tuple[str, str]:
    """Write adapter and base as one model; returns what the base is and what the weights are stored in."""
    from transformers import AutoTokenizer
    from transformers.trainer_utils import align_special_tokens

    hush_libraries()
    adapter = adapter_of("export", str(run))
    name = adapter.base_model_name_or_path
    base = base_of("export", str(run), adapter)
    stored = dtype or str(load_config("export", base, trusted).dtype or "float32").removeprefix("torch.")
    # In float32, so that the sum of base and adapter is rounded once.
    model = load_model(_auto_class(stage), "export", str(run), trusted, dtype="float32")
    # As TRL's trainers do with a whole model: generation ends, and a classifier reads, at the tokenizer's tokens.
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
            raise RecipeError(f"export: {name} has weights that are no numbers in {dtype}; take --dtype float32.")
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = True
    with loading("export", model.config.name_or_path):
        model.save_pretrained(part, max_shard_size=SHARD)


def _auto_class(stage: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
