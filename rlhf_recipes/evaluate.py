"""Stage eval: what the trained models say on held-out prompts, and what it scores.

    accelerate launch -m rlhf_recipes.evaluate --recipe imdb_tiny

Reads `data`, `reward_funcs` and `eval`; writes `eval.json` (`models.<name>.<metric>`, histograms of the completions'
lengths, and samples side by side) and `completions.jsonl` to `<runs_dir>/<recipe>/eval/`. Every model gets the same
prompts and the same sampling seed. Where held-out prompts have completions, ROUGE says how near a model comes to them.
"""

import json
import math
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config import RecipeError
from rlhf_recipes.entry import stage_command
from rlhf_recipes.metrics import distinct_n, length_histograms, mean_and_std, repetition_rate, rouge
from rlhf_recipes.reward_calls import as_text
from rlhf_recipes.run import Run, eval_models

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_recipes.samples import Samples


def main(run: Run) -> str:
    import torch
    from accelerate import PartialState
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from rlhf_recipes.data import load_rows
    from rlhf_recipes.models import check_context, fit_embeddings, load_model
    from rlhf_recipes.references import resolve_model
    from rlhf_recipes.reward_funcs import build_reward_funcs, score_all
    from rlhf_recipes.samples import sample
    from rlhf_recipes.shapes import prompts
    from rlhf_recipes.tokenizer import load_tokenizer

    recipe, settings = run.recipe, run.recipe.eval
    models = eval_models(recipe)
    reference_name = next(iter(models))
    score_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    judge_funcs = build_reward_funcs(recipe, settings.judge_funcs, key="eval.judge_funcs")
    tokenizer = load_tokenizer(recipe, f"eval.models.{reference_name}", models[reference_name])
    rows = prompts(recipe.data, load_rows(recipe.data, recipe.seed)[1], tokenizer, recipe.seed)
    rows = rows.shuffle(seed=recipe.seed).select(range(min(len(rows), settings.num_prompts)))
    columns = {name: rows[name][:] for name in rows.column_names if name != "prompt"}
    new_tokens = settings.max_new_tokens or _training_length(recipe)
    device = PartialState().device

    def load(name: str):
        folder = resolve_model(recipe, f"eval.models.{name}", models[name])
        trusted = models[name] in recipe.trust_remote_code
        model = load_model(AutoModelForCausalLM, f"eval.models.{name}", folder, trusted, dtype="auto")
        return model.to(device).eval()

    reference, reference_tokenizer = load(reference_name), tokenizer
    measured, answers = {}, {}
    for name in tqdm(models, desc="eval   ", unit="model", disable=None, leave=False):
        model = reference if name == reference_name else load(name)
        tokenizer = load_tokenizer(recipe, f"eval.models.{name}", models[name])
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise RecipeError(
                f"eval.models.{name}: another tokenizer than {reference_name}'s, so there is no KL between them."
            )
        check_context(recipe, f"eval.models.{name}", models[name], rows, tokenizer, new_tokens)
        fit_embeddings(f"eval.models.{name}", model, tokenizer)
        torch.manual_seed(recipe.seed)
        samples = sample(model, tokenizer, rows["prompt"][:], new_tokens, settings.temperature, settings.batch_size)
        own, under_reference = (sequence_logps(m, tokenizer, samples, settings.batch_size) for m in (model, reference))
        call = columns | {
            "prompts": rows["prompt"][:],
            "completions": samples.completions,
            "completion_ids": samples.completion_ids,
            "finished": samples.finished,
        }
        scores, by_func = score_all(recipe.reward_funcs, score_funcs, **call)
        judged, by_judge = score_all(settings.judge_funcs, judge_funcs, **call) if settings.judge_funcs else (None, {})
        measured[name] = {
            **_score_metrics(scores, settings.positive_threshold),
            **_judge_metrics(judged),
            **{f"score/{func}": _mean(values) for func, values in by_func.items()},
            **{f"judge/{func}": _mean(values) for func, values in by_judge.items()},
            **_text_metrics(samples),
            **(rouge(_texts(samples.completions), _texts(columns["reference"])) if "reference" in columns else {}),
            **_likelihood_metrics(samples, own, under_reference),
        }
        answers[name] = {"samples": samples, "scores": scores, "judged": judged}
    lengths = {name: _lengths(answer["samples"]) for name, answer in answers.items()}
    _write(run, rows["prompt"][:], measured, answers, length_histograms(lengths, new_tokens))
    run.results = measured
    return ", ".join(f"{name}: score {values['score_mean']:.2f}" for name, values in measured.items())


def sequence_logps(model, tokenizer, samples: "Samples", batch_size: int) -> "Tensor":
    """Log-probability of every whole completion under a model at temperature 1, (number of prompts,), on the CPU."""
    import torch

    from rlhf_recipes.forward import completion_logits, pad_batch, sampled_logps

    sums = []
    for start in range(0, len(samples.prompt_ids), batch_size):
        part = slice(start, start + batch_size)
        batch = pad_batch(samples.prompt_ids[part], samples.completion_ids[part], tokenizer.pad_token_id)
        ids, attention_mask, mask = (tensor.to(model.device) for tensor in batch)
        with torch.inference_mode():
            logits, _ = completion_logits(model, ids, attention_mask, mask.size(1))
            logps, _ = sampled_logps(logits, ids[:, -mask.size(1) :], temperature=1.0)
            sums.append((logps * mask).sum(1).cpu())
    return torch.cat(sums)


def _training_length(recipe) -> int:
    for stage in (recipe.ppo, recipe.rloo):
        if stage is not None and "max_completion_length" in stage.trainer:
            return stage.trainer["max_completion_length"]
    from trl import RLOOConfig

    return RLOOConfig.max_completion_length


def _texts(messages: list) -> list[str]:
    return [as_text(message) for message in messages]


def _ids_without_eos(samples: "Samples") -> list[list[int]]:
    """Token ids without EOS, which is no word of the text: a longer text is not thereby a more repetitive one."""
    return [ids[:-1] if ended else ids for ids, ended in zip(samples.completion_ids, samples.finished, strict=True)]


def _lengths(samples: "Samples") -> list[int]:
    return [len(row) for row in _ids_without_eos(samples)]


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _score_metrics(scores: list[float | None], threshold: float) -> dict[str, float]:
    there = [score for score in scores if score is not None]
    if not there:
        raise RecipeError("reward_funcs: no reward function applies to any completion, so there is no score.")
    mean, std = mean_and_std(there)
    return {"score_mean": mean, "score_std": std, "positive_share": _mean([score > threshold for score in there])}


def _judge_metrics(judged: list[float | None] | None) -> dict[str, float | None]:
    if judged is None:
        return {}
    positive = [None if score is None else score > 0 for score in judged]
    return {"judge_mean": _mean(judged), "judge_positive_share": _mean(positive)}


def _text_metrics(samples: "Samples") -> dict[str, float]:
    ids = _ids_without_eos(samples)
    length_mean, length_std = mean_and_std(_lengths(samples))
    return {
        "length_mean": length_mean,
        "length_std": length_std,
        "empty_share": _mean([not text.strip() for text in _texts(samples.completions)]),
        "eos_rate": _mean(samples.finished),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
        "repetition": repetition_rate(ids),
    }


def _likelihood_metrics(samples: "Samples", own: "Tensor", under_reference: "Tensor") -> dict[str, float]:
    tokens = sum(map(len, samples.completion_ids))
    kl = (own - under_reference).sum().item()
    return {
        "kl": kl / len(own),
        "kl_per_token": kl / tokens,
        "perplexity": math.exp(-under_reference.sum().item() / tokens),
    }


def _write(run: Run, prompts: list, measured: dict, answers: dict, lengths: dict) -> None:
    if not run.is_main:
        return
    lines = []
    for i, prompt in enumerate(prompts):
        line: dict[str, Any] = {"prompt": prompt}
        for name, answer in answers.items():
            line[name] = {"completion": answer["samples"].completions[i], "score": answer["scores"][i]}
            if answer["judged"] is not None:
                line[name]["judge"] = answer["judged"][i]
        lines.append(line)
    with open(run.path / "completions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    report = {
        "recipe": run.recipe.name,
        "num_prompts": len(prompts),
        "seed": run.recipe.seed,
        "models": measured,
        "length_histograms": lengths,
        "samples": lines[: run.recipe.eval.num_samples],
    }
    (run.path / "eval.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    stage_command("eval", main)
