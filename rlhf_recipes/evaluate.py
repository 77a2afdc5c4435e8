"""Stage eval: what the trained models say on held-out prompts, and what it scores.

    accelerate launch -m rlhf_recipes.evaluate --recipe imdb_tiny

Reads `data`, `reward_funcs` and `eval`; writes `eval.json` (`models.<name>.<metric>` and samples side by side) and
`completions.jsonl` to `<runs_dir>/<recipe>/eval/`. Every model gets the same prompts and the same sampling seed.
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config import RecipeError
from rlhf_recipes.entry import stage_command
from rlhf_recipes.metrics import distinct_n, mean_and_std, repetition_rate
from rlhf_recipes.run import Run, eval_models

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Samples:
    """What one model answered, one entry per prompt."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    """First EOS included."""
    completions: list[Any]
    finished: list[bool]


def main(run: Run) -> str:
    import torch
    from accelerate import PartialState
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from rlhf_recipes.data import load_rows, prompts
    from rlhf_recipes.models import check_context, load_model, load_tokenizer, resolve_model
    from rlhf_recipes.reward_funcs import build_reward_funcs, score_all

    recipe, settings = run.recipe, run.recipe.eval
    folders = {
        name: resolve_model(recipe, f"eval.models.{name}", reference) for name, reference in eval_models(recipe).items()
    }
    reference_name = next(iter(folders))
    score_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    judge_funcs = build_reward_funcs(recipe, settings.judge_funcs, key="eval.judge_funcs")
    tokenizer = load_tokenizer(f"eval.models.{reference_name}", folders[reference_name])
    rows = prompts(recipe, load_rows(recipe)[1], tokenizer)
    rows = rows.shuffle(seed=recipe.seed).select(range(min(len(rows), settings.num_prompts)))
    columns = {name: rows[name][:] for name in rows.column_names if name != "prompt"}
    new_tokens = settings.max_new_tokens or _training_length(recipe)
    device = PartialState().device

    def trusts(name: str) -> bool:
        return eval_models(recipe)[name] in recipe.trust_remote_code

    def load(name: str):
        model = load_model(AutoModelForCausalLM, f"eval.models.{name}", folders[name], trusts(name), dtype="auto")
        return model.to(device).eval()

    reference, reference_tokenizer = load(reference_name), tokenizer
    measured, answers = {}, {}
    for name in tqdm(folders, desc="eval   ", unit="model", disable=None, leave=False):
        model = reference if name == reference_name else load(name)
        tokenizer = load_tokenizer(f"eval.models.{name}", folders[name])
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise RecipeError(
                f"eval.models.{name}: another tokenizer than {reference_name}'s, so there is no KL between them."
            )
        check_context(f"eval.models.{name}", folders[name], rows, tokenizer, new_tokens, trusts(name))
        torch.manual_seed(recipe.seed)
        samples = sample(model, tokenizer, rows["prompt"][:], new_tokens, settings.temperature, settings.batch_size)
        own, under_reference = (
            sequence_logps(m, tokenizer, samples, settings.temperature, settings.batch_size) for m in (model, reference)
        )
        call = columns | {
            "prompts": rows["prompt"][:],
            "completions": samples.completions,
            "completion_ids": samples.completion_ids,
            "finished": samples.finished,
        }
        scores, by_func = score_all(recipe.reward_funcs, score_funcs, **call)
        judged, by_judge = score_all(settings.judge_funcs, judge_funcs, **call) if settings.judge_funcs else (None, {})
        measured[name] = (
            _score_metrics(scores, settings.positive_threshold)
            | (
                {}
                if judged is None
                else {
                    "judge_mean": _mean(judged),
                    "judge_positive_share": _mean([None if j is None else j > 0 for j in judged]),
                }
            )
            | {f"score/{func}": _mean(values) for func, values in by_func.items()}
            | {f"judge/{func}": _mean(values) for func, values in by_judge.items()}
            | _text_metrics(samples)
            | _likelihood_metrics(samples, own, under_reference)
        )
        answers[name] = {"samples": samples, "scores": scores, "judged": judged}
    _write(run, rows["prompt"][:], measured, answers)
    run.results = measured
    return ", ".join(f"{name}: score {values['score_mean']:.2f}" for name, values in measured.items())


def sample(model, tokenizer, prompts: list, new_tokens: int, temperature: float, batch_size: int) -> Samples:
    """Sample one completion for every prompt, from the unchanged distribution (no top-k, no top-p)."""
    from rlhf_recipes.forward import pad_batch
    from rlhf_recipes.models import continuation, eos_token_ids, token_ids
    from rlhf_recipes.sampling import sample_completions

    ends = eos_token_ids(model, tokenizer)
    prompt_ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    completion_ids = []
    for start in range(0, len(prompts), batch_size):
        part = prompt_ids[start : start + batch_size]
        ids, attention_mask, _ = pad_batch(part, [[] for _ in part], tokenizer.pad_token_id)
        completion_ids += sample_completions(
            model, ids.to(model.device), attention_mask.to(model.device), new_tokens, temperature, ends
        )
    finished = [bool(ids) and ids[-1] in ends for ids in completion_ids]
    texts = [continuation(tokenizer, p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    chat = bool(prompts) and not isinstance(prompts[0], str)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    return Samples(prompt_ids, completion_ids, completions, finished)


def sequence_logps(model, tokenizer, samples: Samples, temperature: float, batch_size: int) -> "Tensor":
    """Log-probability of every whole completion under a model, (number of prompts,), on the CPU."""
    import torch

    from rlhf_recipes.forward import completion_logits, pad_batch, sampled_logps

    sums = []
    for start in range(0, len(samples.prompt_ids), batch_size):
        part = slice(start, start + batch_size)
        batch = pad_batch(samples.prompt_ids[part], samples.completion_ids[part], tokenizer.pad_token_id)
        ids, attention_mask, mask = (tensor.to(model.device) for tensor in batch)
        with torch.inference_mode():
            logits, _ = completion_logits(model, ids, attention_mask, mask.size(1))
            logps, _ = sampled_logps(logits, ids[:, -mask.size(1) :], temperature)
            sums.append((logps * mask).sum(1).cpu())
    return torch.cat(sums)


def _training_length(recipe) -> int:
    for stage in (recipe.ppo, recipe.rloo):
        if stage is not None and "max_completion_length" in stage.trainer:
            return stage.trainer["max_completion_length"]
    from trl import RLOOConfig

    return RLOOConfig.max_completion_length


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _score_metrics(scores: list[float | None], threshold: float) -> dict[str, float]:
    there = [score for score in scores if score is not None]
    if not there:
        raise RecipeError("reward_funcs: no reward function applies to any completion, so there is no score.")
    mean, std = mean_and_std(there)
    return {"score_mean": mean, "score_std": std, "positive_share": _mean([score > threshold for score in there])}


def _text_metrics(samples: Samples) -> dict[str, float]:
    # EOS is no word of the text: without it, a longer text is not thereby a more repetitive one.
    words = [ids[:-1] if ended else ids for ids, ended in zip(samples.completion_ids, samples.finished, strict=True)]
    length_mean, length_std = mean_and_std([len(row) for row in words])
    return {
        "length_mean": length_mean,
        "length_std": length_std,
        "eos_rate": _mean(samples.finished),
        "distinct_1": distinct_n(words, 1),
        "distinct_2": distinct_n(words, 2),
        "repetition": repetition_rate(words),
    }


def _likelihood_metrics(samples: Samples, own: "Tensor", under_reference: "Tensor") -> dict[str, float]:
    tokens = sum(map(len, samples.completion_ids))
    kl = (own - under_reference).sum().item()
    return {
        "kl": kl / len(own),
        "kl_per_token": kl / tokens,
        "perplexity": math.exp(-under_reference.sum().item() / tokens),
    }


def _write(run: Run, prompts: list, measured: dict, answers: dict) -> None:
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
        "samples": lines[: run.recipe.eval.num_samples],
    }
    (run.path / "eval.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    stage_command("eval", main)
