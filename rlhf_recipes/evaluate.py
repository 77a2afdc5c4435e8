"""Stage eval: what any set of models says on held-out prompts, and what it scores.

    rlhf-recipes eval imdb_tiny

Reads `data`, `reward_funcs` and `eval`; writes to `<runs_dir>/<recipe>/eval/`: `eval.json` (`models.<name>.<metric>`,
histograms of the completions' lengths, samples side by side), `eval.md` (its tables), `completions.jsonl` (a prompt a
line). Every model gets the same prompts and the same sampling seed, and is written down as soon as it is measured: when
stopped, the same command goes on with the next one, and comes to the same result. No GPU is needed.
"""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlhf_recipes.evaluation.metrics import (
    distinct_n,
    length_histograms,
    mean_and_std,
    ngram_repetition,
    perplexity,
    rouge,
    unique_token_ratio,
)
from rlhf_recipes.pages.tables import markdown_tables
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.folder import PARTS, Run, eval_models, eval_reference, training_length
from rlhf_recipes.runs.trackers import log_eval
from rlhf_recipes.stage import stage_command
from rlhf_recipes.system.files import write_whole, writing

if TYPE_CHECKING:
    from datasets import Dataset

    from rlhf_recipes.models.samples import Samples


def main(run: Run) -> str:
    from tqdm import tqdm

    from rlhf_recipes.data.tokenizer import load_tokenizer

    if not run.is_main:
        return ""  # one process measures
    recipe, models = run.recipe, eval_models(run.recipe)
    tokenizers = {name: load_tokenizer(recipe, f"eval.models.{name}", models[name]) for name in models}
    rows = held_out_prompts(recipe, tokenizers[eval_reference(recipe)])
    new_tokens = recipe.eval.max_new_tokens or longest_in_training(recipe)
    _check_models(recipe, tokenizers, rows, new_tokens)
    evaluator = Evaluator(recipe, tokenizers, rows, new_tokens)
    folder, parts = run.path / PARTS, {}
    folder.mkdir(exist_ok=True)  # a run that has it goes on
    with tqdm(total=len(models) * len(rows), desc="eval   ", unit="completion", disable=None, leave=False) as bar:
        for name in models:
            file = folder / f"{_fingerprint(run, name, rows)}.json"
            if file.exists():
                bar.update(len(rows))
            else:
                part = evaluator.measure(name, bar.update)
                with writing(f"what eval has measured of {name}", file):
                    write_whole(file, json.dumps(part, ensure_ascii=False))
            parts[name] = json.loads(file.read_text(encoding="utf-8"))
    _write(run, rows, parts, new_tokens)
    log_eval(recipe, run.path, run.manifest["id"])
    shutil.rmtree(folder)  # last: should W&B fail, nothing is measured again
    run.results = {name: part["metrics"] for name, part in parts.items()}
    return ", ".join(f"{name}: score {metrics['score_mean']:.2f}" for name, metrics in run.results.items())


class Evaluator:
    """Measures models on the same prompts, one after the other; each comes out as if it were the only one.

    Args:
        recipe: The recipe.
        tokenizers: Name of each model -> its tokenizer.
        rows: Held-out prompts, with the data's other columns.
        new_tokens: Longest completion.
    """

    def __init__(self, recipe: Recipe, tokenizers: dict[str, Any], rows: "Dataset", new_tokens: int):
        from rlhf_recipes.rewards.registry import build_reward_funcs

        self.recipe, self.tokenizers, self.new_tokens = recipe, tokenizers, new_tokens
        self.prompts = rows["prompt"][:]
        self.columns = {name: rows[name][:] for name in rows.column_names if name != "prompt"}
        self.score_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
        self.held_out_funcs = build_reward_funcs(recipe, recipe.eval.held_out_funcs, key="eval.held_out_funcs")
        self.reference_name = eval_reference(recipe)

    @functools.cached_property
    def reference(self) -> Any:
        return self._model(self.reference_name)

    @functools.cached_property
    def other(self) -> tuple[Any, Any]:
        """The model of `perplexity_other`, and its tokenizer."""
        from rlhf_recipes.data.tokenizer import load_tokenizer

        key, reference = "eval.perplexity_model", self.recipe.eval.perplexity_model
        tokenizer = load_tokenizer(self.recipe, key, reference)
        return _load(self.recipe, key, reference, tokenizer), tokenizer

    def _model(self, name: str) -> Any:
        return _load(self.recipe, f"eval.models.{name}", eval_models(self.recipe)[name], self.tokenizers[name])

    def measure(self, name: str, progress: Callable[[int], Any]) -> dict[str, Any]:
        """Sample a model's completions, and measure them.

        Args:
            name: One of `eval_models`.
            progress: Told after every batch how many completions it had.

        Returns:
            `metrics`, `answers` (one for each prompt, as `completions.jsonl` has them) and `notes`, sentences on what
            could not be measured.
        """
        from transformers import set_seed

        from rlhf_recipes.models.likelihoods import sequence_logps, text_logps
        from rlhf_recipes.models.samples import Samples, sample
        from rlhf_recipes.rewards.calls import score_all

        settings, tokenizer = self.recipe.eval, self.tokenizers[name]
        comparable = tokenizer.get_vocab() == self.tokenizers[self.reference_name].get_vocab()
        # All of them are loaded before random numbers are set: loading one may draw some.
        model = self.reference if name == self.reference_name else self._model(name)
        reference = self.reference if comparable else None
        other = self.other if settings.perplexity_model is not None else None
        samples, own, under_reference = Samples([], [], [], []), [], []
        other_logps, other_tokens = [], 0
        set_seed(self.recipe.seed)  # also for reward functions that draw
        for start in range(0, len(self.prompts), settings.batch_size):
            prompts = self.prompts[start : start + settings.batch_size]
            batch = sample(model, tokenizer, prompts, self.new_tokens, settings.temperature, len(prompts))
            for column, values in vars(samples).items():
                values += getattr(batch, column)
            if comparable:
                ids = batch.prompt_ids, batch.completion_ids
                found = sequence_logps(model, tokenizer, *ids)
                own += found
                under_reference += found if model is reference else sequence_logps(reference, tokenizer, *ids)
            if other is not None:
                logps, counts = text_logps(*other, prompts, batch.completions)
                other_logps, other_tokens = other_logps + logps, other_tokens + sum(counts)
            progress(len(prompts))
        call = self.columns | {
            "prompts": self.prompts,
            "completions": samples.completions,
            "completion_ids": samples.completion_ids,
            "finished": samples.finished,
        }
        scores, by_func = score_all(self.recipe.reward_funcs, self.score_funcs, **call)
        held_out, by_held_out = score_all(settings.held_out_funcs, self.held_out_funcs, **call)
        tokens = sum(map(len, samples.completion_ids))
        metrics = {
            **_score_metrics(scores, by_func, settings.positive_threshold),
            **(_held_out_metrics(held_out, by_held_out) if settings.held_out_funcs else {}),
            **_text_metrics(samples),
            **(rouge(*_texts(samples.completions, self.columns["reference"])) if "reference" in self.columns else {}),
            **_likelihood_metrics(own, under_reference, tokens),
        }
        if other is not None:
            metrics["perplexity_other"] = perplexity(other_logps, other_tokens)
        lengths, answers = list(map(len, _words(samples))), []
        for i, completion in enumerate(samples.completions):
            answer = {"completion": completion, "score": scores[i], "scores": {f: v[i] for f, v in by_func.items()}}
            answer |= {"held_out": held_out[i]} if settings.held_out_funcs else {}
            answers.append(answer | {"tokens": lengths[i], "finished": samples.finished[i]})
        return {"metrics": metrics, "answers": answers, "notes": self._notes(name, metrics, comparable, own)}

    def _notes(self, name: str, metrics: dict[str, Any], comparable: bool, own: list[float]) -> list[str]:
        if not comparable:
            return [
                f"{name} has another tokenizer than {self.reference_name}: no KL and no perplexity under it, and its "
                "lengths, distinct-n and repetition count tokens of its own."
            ]
        if metrics["kl"] is not None and metrics["perplexity"] is not None:
            return []
        what = "likelihoods of its completions are not finite, so KL and perplexity cannot be told"
        if all(map(math.isfinite, own)):
            return [
                f"{name}: under {self.reference_name}, the {what}; {self.reference_name} may have diverged, or lack "
                f"tokens that {name} writes."
            ]
        return [f"{name}: the {what}; its training may have diverged."]


def longest_in_training(recipe: Recipe, stages: tuple[str, ...] = ("ppo", "rloo")) -> int:
    """Longest completion of the first of some stages that sets it; TRL's default where none does."""
    length = training_length(recipe, stages)
    if length is None:
        from trl import RLOOConfig

        length = RLOOConfig.max_completion_length
    return length


def held_out_prompts(recipe: Recipe, tokenizer: Any) -> "Dataset":
    """The prompts, which are texts, or messages: the same for all models, whatever the tokenizer that cuts them."""
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import prompts

    rows = prompts(recipe.data, load_rows(recipe.data, recipe.seed)[1], tokenizer, recipe.seed)
    return rows.shuffle(seed=recipe.seed).select(range(min(len(rows), recipe.eval.num_prompts)))


def _check_models(recipe: Recipe, tokenizers: dict[str, Any], rows: "Dataset", new_tokens: int) -> None:
    """Refuse what would stop the stage after hours of sampling; every finding."""
    from rlhf_recipes.models.load import check_context, config_of

    findings = []
    for name, reference in eval_models(recipe).items():
        key = f"eval.models.{name}"
        if not isinstance(rows[0]["prompt"], str) and not tokenizers[name].chat_template:
            findings.append(
                f"{key}: prompts are chat messages, but the tokenizer of {reference} has no chat template; save one "
                "beside the model as chat_template.jinja, or leave the model out of eval.models."
            )
            continue
        try:
            check_context(recipe, key, reference, rows, tokenizers[name], new_tokens)
        except RecipeError as error:
            findings.append(str(error))
    if recipe.eval.perplexity_model is not None:
        try:
            config_of(recipe, "eval.perplexity_model", recipe.eval.perplexity_model)
        except RecipeError as error:
            findings.append(str(error))
    if findings:
        raise RecipeError("\n".join(findings))


def _load(recipe: Recipe, key: str, reference: str, tokenizer: Any) -> Any:
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, set_seed

    from rlhf_recipes.models.load import fit_embeddings, load_model
    from rlhf_recipes.runs.references import resolve_model

    folder = resolve_model(recipe, key, reference)
    model = load_model(AutoModelForCausalLM, key, folder, reference in recipe.trust_remote_code, dtype="auto")
    set_seed(recipe.seed)  # new rows of the embeddings are random
    fit_embeddings(key, model, tokenizer)
    return model.to(PartialState().device).eval()


def _fingerprint(run: Run, name: str, rows: "Dataset") -> str:
    """Changes with everything that a model's part depends on: settings, runs that are read, prompts, weights."""
    from rlhf_recipes.runs.references import WEIGHTS, resolve_model

    recipe = run.recipe
    read = {f"eval.models.{each}": path for each, path in eval_models(recipe).items()}
    read = {key: read[key] for key in (f"eval.models.{name}", f"eval.models.{eval_reference(recipe)}")}
    if recipe.eval.perplexity_model is not None:
        read["eval.perplexity_model"] = recipe.eval.perplexity_model
    weights = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for key, reference in read.items()
        for file in sorted(Path(resolve_model(recipe, key, reference)).glob(WEIGHTS))
    ]
    text = json.dumps([name, run.settings, run.inputs, rows["prompt"][:], weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _texts(*columns: list) -> list[list[str]]:
    return [[as_text(message) for message in column] for column in columns]


def _words(samples: "Samples") -> list[list[int]]:
    """Token ids without EOS, which is no word of the text: a longer text is not thereby a more repetitive one."""
    return [ids[:-1] if ended else ids for ids, ended in zip(samples.completion_ids, samples.finished, strict=True)]


def _statistics(values: list[float | None]) -> dict[str, float | None]:
    there = [value for value in values if value is not None]
    mean, std = mean_and_std(there) if there else (None, None)
    return {"mean": mean, "std": std, "min": min(there, default=None), "max": max(there, default=None)}


def _share_above(values: list[float | None], threshold: float) -> float | None:
    there = [value > threshold for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _score_metrics(
    scores: list[float | None], by_func: dict[str, list[float | None]], threshold: float
) -> dict[str, float | None]:
    if all(score is None for score in scores):
        raise RecipeError("reward_funcs: no reward function applies to any completion, so there is no score.")
    metrics = {f"score_{name}": value for name, value in _statistics(scores).items()}
    metrics["positive_share"] = _share_above(scores, threshold)
    for func, values in by_func.items():
        of_func = _statistics(values)
        metrics[f"score/{func}"] = of_func.pop("mean")
        metrics |= {f"score/{func}/{name}": value for name, value in of_func.items()}
    return metrics


def _held_out_metrics(scores: list[float | None], by_func: dict[str, list[float | None]]) -> dict[str, float | None]:
    metrics = {"held_out_mean": _statistics(scores)["mean"], "held_out_positive_share": _share_above(scores, 0)}
    return metrics | {f"held_out/{func}": _statistics(values)["mean"] for func, values in by_func.items()}


def _text_metrics(samples: "Samples") -> dict[str, float | None]:
    ids = _words(samples)
    length_mean, length_std = mean_and_std([len(row) for row in ids])
    return {
        "length_mean": length_mean,
        "length_std": length_std,
        "empty_share": fmean(not as_text(text).strip() for text in samples.completions),
        "eos_rate": fmean(samples.finished),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
        "distinct_3": distinct_n(ids, 3),
        "unique_token_ratio": unique_token_ratio(ids),
        "repetition": ngram_repetition(ids),
    }


def _likelihood_metrics(own: list[float], under_reference: list[float], tokens: int) -> dict[str, float | None]:
    """KL of a model from the reference, and perplexity of its samples under that, EOS counted; None: cannot be told.

    KL is the mean of log p(y) - log p_ref(y) over whole completions y that the model itself sampled, an unbiased
    estimate where `eval.temperature` is 1; per token it is the sum of these over the number of all tokens.
    """
    if not all(map(math.isfinite, [*own, *under_reference])) or not own:
        return dict.fromkeys(("kl", "kl_per_token", "perplexity"))
    kl = math.fsum(p - q for p, q in zip(own, under_reference, strict=True))
    return {"kl": kl / len(own), "kl_per_token": kl / tokens, "perplexity": perplexity(under_reference, tokens)}


def _write(run: Run, rows: "Dataset", parts: dict[str, dict[str, Any]], new_tokens: int) -> None:
    recipe, lines = run.recipe, []
    for i, prompt in enumerate(rows["prompt"]):
        line = {"prompt": prompt, "models": {name: part["answers"][i] for name, part in parts.items()}}
        if "reference" in rows.column_names:
            line["reference"] = rows[i]["reference"]
        lines.append(line)
    lengths = {name: [answer["tokens"] for answer in part["answers"]] for name, part in parts.items()}
    report = {
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
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(run.path / "completions.jsonl", text)
        write_whole(run.path / "eval.md", f"# {recipe.name}: held-out prompts\n\n{about}\n\n{tables}")
        write_whole(run.path / "eval.json", json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    stage_command("eval", main)
