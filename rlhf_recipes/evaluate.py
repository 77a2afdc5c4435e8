"""Stage eval: completions and scores of any set of models on the same held-out prompts.

    rlhf-recipes eval imdb_tiny

Reads `data`, `reward_funcs` and `eval`. Writes to `<runs_dir>/<recipe>/eval/`: `eval.json` (`models.<name>.<metric>`,
histograms of the completions' lengths, samples side by side), `eval.md` (its tables) and `completions.jsonl` (a prompt
a line). Every model gets the same prompts and the same sampling seed. Each model's result is written as soon as it is
measured: after a stop, the same command continues with the next model, and the result is the same. Needs no GPU.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.evaluation.evaluator import Evaluator, held_out_prompts, longest_in_training
from rlhf_recipes.evaluation.metrics import length_histograms
from rlhf_recipes.pages.tables import markdown_tables
from rlhf_recipes.recipe.graph import eval_models, eval_reference
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.files import COMPLETIONS, PARTS
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import log_eval
from rlhf_recipes.stage import stage_command
from rlhf_recipes.system.files import as_lines, read_json, sealed, stamp_of, write_whole, writing

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def main(run: Run) -> str:
    from tqdm import tqdm

    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.models.load import config_of

    if not run.is_main:
        return ""  # one process measures
    recipe, models = run.recipe, eval_models(run.recipe)
    for name, model_id in models.items():
        config_of(recipe, f"eval.models.{name}", model_id)  # before its tokenizer, whose fault may be the model's
    tokenizers = {name: load_tokenizer(recipe, f"eval.models.{name}", models[name]) for name in models}
    rows = held_out_prompts(recipe, tokenizers[eval_reference(recipe)])
    new_tokens = recipe.eval.max_new_tokens or longest_in_training(recipe)
    _check_models(recipe, tokenizers, rows, new_tokens)
    evaluator = Evaluator(recipe, tokenizers, rows, new_tokens)
    folder, parts = run.path / PARTS, {}
    folder.mkdir(exist_ok=True)  # a stopped run has it
    with tqdm(total=len(models) * len(rows), desc="eval   ", unit="completion", disable=None, leave=False) as bar:
        for name in models:
            file = folder / f"{_fingerprint(run, name, rows)}.json"
            if file.exists():
                try:
                    parts[name] = read_json(file)
                    bar.update(len(rows))
                    continue
                except RecipeError as error:
                    logger.warning("%s is measured again: %s", name, str(error).partition(";")[0])
            part = evaluator.measure(name, bar.update)
            with writing(f"the result of {name}", file):
                write_whole(file, sealed(part))
            parts[name] = read_json(file)
    _write(run, rows, parts, new_tokens)
    log_eval(recipe, run.path, run.manifest["id"])
    shutil.rmtree(folder)  # last: if W&B fails, nothing is measured again
    run.results = {name: part["metrics"] for name, part in parts.items()}
    return ", ".join(f"{name}: score {metrics['score_mean']:.2f}" for name, metrics in run.results.items())


def _check_models(recipe: Recipe, tokenizers: dict[str, Any], rows: "Dataset", new_tokens: int) -> None:
    """Find every error that would stop the stage after hours of sampling.

    Raises:
        RecipeError: All findings, one a line.
    """
    from rlhf_recipes.models.limits import check_context
    from rlhf_recipes.models.load import config_of

    findings = []
    for name, model_id in eval_models(recipe).items():
        key = f"eval.models.{name}"
        if not isinstance(rows[0]["prompt"], str) and not tokenizers[name].chat_template:
            findings.append(
                f"{key}: prompts are chat messages, but the tokenizer of {model_id} has no chat template; save one "
                "beside the model as chat_template.jinja, or leave the model out of eval.models."
            )
            continue
        try:
            check_context(recipe, key, model_id, rows, tokenizers[name], new_tokens)
        except RecipeError as error:
            findings.append(str(error))
    if recipe.eval.perplexity_model is not None:
        try:
            config_of(recipe, "eval.perplexity_model", recipe.eval.perplexity_model)
        except RecipeError as error:
            findings.append(str(error))
    if findings:
        raise RecipeError("\n".join(findings))


def _fingerprint(run: Run, name: str, rows: "Dataset") -> str:
    """Changes with everything that a model's result depends on: settings, input runs, prompts, weights."""
    from rlhf_recipes.runs.references import WEIGHTS, resolve_model

    recipe, models = run.recipe, eval_models(run.recipe)
    model_ids = {f"eval.models.{each}": models[each] for each in (name, eval_reference(recipe))}
    if recipe.eval.perplexity_model is not None:
        model_ids["eval.perplexity_model"] = recipe.eval.perplexity_model
    weights = [
        stamp_of(file)
        for key, model_id in model_ids.items()
        for file in sorted(Path(resolve_model(recipe, key, model_id)).glob(WEIGHTS))
    ]
    text = json.dumps([name, run.settings, run.inputs, rows["prompt"][:], weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(run: Run, rows: "Dataset", parts: dict[str, dict[str, Any]], new_tokens: int) -> None:
    recipe, lines = run.recipe, []
    for i, prompt in enumerate(rows["prompt"]):
        line = {"prompt": prompt, "models": {name: part["answers"][i] for name, part in parts.items()}}
        if "gold" in rows.column_names:
            line["gold"] = rows[i]["gold"]
        lines.append(line)
    lengths = {name: [answer["tokens"] for answer in part["answers"]] for name, part in parts.items()}
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "num_prompts": len(rows),
        "seed": recipe.seed,
        "reference": eval_reference(recipe),
        "paths": eval_models(recipe),
        "models": {name: part["metrics"] for name, part in parts.items()},
        "length_histograms": length_histograms(lengths, new_tokens),
        "samples": lines[: recipe.eval.num_samples],
        "notes": [note for part in parts.values() for note in part["notes"]],
    }
    about = (
        f"{len(rows)} prompts, one completion each, sampled with seed {recipe.seed}; KL and perplexity are about "
        f"{report['reference']}."
    )
    tables = markdown_tables(report["models"], report["notes"])
    with writing("the results", run.path):
        write_whole(run.path / COMPLETIONS, as_lines(lines))
        write_whole(run.path / "eval.md", f"# {recipe.name}: held-out prompts\n\n{about}\n\n{tables}")
        write_whole(run.path / "eval.json", json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    stage_command("eval", main)
