"""Measures models on held-out prompts: completions, scores, KL and perplexity."""

import functools
import math
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlhf_recipes.evaluation.metrics import (
    distinct_n,
    mean_and_std,
    ngram_repetition,
    perplexity,
    rouge,
    unique_token_ratio,
)
from rlhf_recipes.recipe.graph import eval_models, eval_reference, training_length
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.recipe.trust import runs_own_code

if TYPE_CHECKING:
    from datasets import Dataset

    from rlhf_recipes.models.samples import Samples


class Evaluator:
    """Measures models on the same prompts, one after the other. The order does not change a model's numbers.

    Args:
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
        self.ref_name = eval_reference(recipe)

    @functools.cached_property
    def ref_model(self) -> Any:
        return self._model(self.ref_name)

    @functools.cached_property
    def perplexity_model(self) -> tuple[Any, Any] | None:
        """The model of `perplexity_other` and its tokenizer; None where the recipe names none."""
        from rlhf_recipes.data.tokenizer import load_tokenizer

        key, model_id = "eval.perplexity_model", self.recipe.eval.perplexity_model
        if model_id is None:
            return None
        tokenizer = load_tokenizer(self.recipe, key, model_id)
        return _load(self.recipe, key, model_id, tokenizer), tokenizer

    def _model(self, name: str) -> Any:
        return _load(self.recipe, f"eval.models.{name}", eval_models(self.recipe)[name], self.tokenizers[name])

    def measure(self, name: str, progress: Callable[[int], Any]) -> dict[str, Any]:
        """Sample a model's completions, and measure them.

        Args:
            name: One of `eval_models`.
            progress: Called after every batch with its number of completions.

        Returns:
            `metrics`, `answers` (one for each prompt, as in `completions.jsonl`) and `notes`, sentences on metrics
            that are missing.
        """
        from transformers import set_seed

        from rlhf_recipes.models.likelihoods import sequence_logps, text_logps
        from rlhf_recipes.models.samples import Samples, sample
        from rlhf_recipes.rewards.calls import score_all

        settings, tokenizer = self.recipe.eval, self.tokenizers[name]
        comparable = tokenizer.get_vocab() == self.tokenizers[self.ref_name].get_vocab()
        # Models are loaded before the seed is set: loading one may draw random numbers.
        model = self.ref_model if name == self.ref_name else self._model(name)
        ref_model = self.ref_model if comparable else None
        other = self.perplexity_model
        samples = Samples([], [], [], [])
        own: list[float] = []
        under_ref: list[float] = []
        other_logps: list[float] = []
        other_tokens = 0
        set_seed(self.recipe.seed)
        for start in range(0, len(self.prompts), settings.batch_size):
            prompts = self.prompts[start : start + settings.batch_size]
            batch = sample(model, tokenizer, prompts, self.new_tokens, settings.temperature, len(prompts))
            for column, values in vars(samples).items():
                values += getattr(batch, column)
            if comparable:
                ids = batch.prompt_ids, batch.completion_ids
                logps = sequence_logps(model, tokenizer, *ids)
                own += logps
                under_ref += logps if model is ref_model else sequence_logps(ref_model, tokenizer, *ids)
            if other is not None:
                logps, counts = text_logps(*other, prompts, batch.completions)
                other_logps += logps
                other_tokens += sum(counts)
            progress(len(prompts))
        call = self.columns | {
            "prompts": self.prompts,
            "completions": samples.completions,
            "completion_ids": samples.completion_ids,
            "finished": samples.finished,
        }
        scores, by_func = score_all(self.recipe.reward_funcs, self.score_funcs, self.recipe.seed, **call)
        held_out, by_held_out = score_all(settings.held_out_funcs, self.held_out_funcs, self.recipe.seed, **call)
        metrics = _score_metrics(scores, by_func, settings.positive_threshold)
        if settings.held_out_funcs:
            metrics |= {
                "held_out_mean": _statistics(held_out)["mean"],
                "held_out_positive_share": _share_above(held_out, 0),
            }
            metrics |= {f"held_out/{func}": _statistics(values)["mean"] for func, values in by_held_out.items()}
        metrics |= _text_metrics(samples)
        if "gold" in self.columns:
            metrics |= rouge(list(map(as_text, samples.completions)), list(map(as_text, self.columns["gold"])))
        metrics |= _likelihood_metrics(own, under_ref, sum(map(len, samples.completion_ids)))
        if other is not None:
            metrics["perplexity_other"] = perplexity(other_logps, other_tokens)
        answers = []
        for i, text_ids in enumerate(_without_eos(samples)):
            answer = {"completion": samples.completions[i], "score": scores[i]}
            answer["scores"] = {func: values[i] for func, values in by_func.items()}
            if settings.held_out_funcs:
                answer["held_out"] = held_out[i]
            answers.append(answer | {"tokens": len(text_ids), "finished": samples.finished[i]})
        return {"metrics": metrics, "answers": answers, "notes": self._notes(name, metrics, comparable, own)}

    def _notes(self, name: str, metrics: dict[str, Any], comparable: bool, own: list[float]) -> list[str]:
        if not comparable:
            return [
                f"{name} has another tokenizer than {self.ref_name}: no KL and no perplexity under it, and its lengths, "
                "distinct-n and repetition count tokens of its own."
            ]
        if metrics["kl"] is not None and metrics["perplexity"] is not None:
            return []
        if not all(map(math.isfinite, own)):
            raise RecipeError(
                f"eval.models.{name}: the likelihoods of its own completions are not finite: its training has diverged."
            )
        return [
            f"{name}: under {self.ref_name}, the likelihoods of its completions are not finite, so KL and perplexity are "
            f"unknown; {self.ref_name} may have diverged, or lack tokens that {name} writes."
        ]


def longest_in_training(recipe: Recipe, stages: tuple[str, ...] = ON_POLICY) -> int:
    """Longest completion of the first of some stages that sets it; TRL's default where none does."""
    from trl import RLOOConfig

    return training_length(recipe, stages) or RLOOConfig.max_completion_length


def held_out_prompts(recipe: Recipe, tokenizer: Any) -> "Dataset":
    """The prompts, which are texts or messages. All models get those that this tokenizer cuts."""
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import prompts, warn_of_known_prompts

    train, held_out = load_rows(recipe.data, recipe.seed)
    warn_of_known_prompts(recipe.data, train, held_out)
    rows = prompts(recipe.data, held_out, tokenizer, recipe.seed)
    return rows.shuffle(seed=recipe.seed).select(range(min(len(rows), recipe.eval.num_prompts)))


def _load(recipe: Recipe, key: str, model_id: str, tokenizer: Any) -> Any:
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, set_seed

    from rlhf_recipes.models.limits import fit_embeddings
    from rlhf_recipes.models.load import load_model
    from rlhf_recipes.runs.references import resolve_model

    folder = resolve_model(recipe, key, model_id)
    model = load_model(AutoModelForCausalLM, key, folder, runs_own_code(recipe, model_id), dtype="auto")
    set_seed(recipe.seed)  # new rows of the embeddings are random
    fit_embeddings(key, model, tokenizer)
    return model.to(PartialState().device).eval()


def _without_eos(samples: "Samples") -> list[list[int]]:
    """Token ids of the texts: EOS is not part of a text, and would make it look less repetitive."""
    return [ids[:-1] if ended else ids for ids, ended in zip(samples.completion_ids, samples.finished, strict=True)]


def _statistics(values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    mean, std = mean_and_std(known) if known else (None, None)
    return {"mean": mean, "std": std, "min": min(known, default=None), "max": max(known, default=None)}


def _share_above(values: list[float | None], threshold: float) -> float | None:
    known = [value > threshold for value in values if value is not None]
    return sum(known) / len(known) if known else None


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


def _text_metrics(samples: "Samples") -> dict[str, float | None]:
    ids = _without_eos(samples)
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


def _likelihood_metrics(own: list[float], under_ref: list[float], tokens: int) -> dict[str, float | None]:
    """KL of a model to the reference, and perplexity of its samples under the reference; None where unknown.

    KL is the mean of log p(y) - log p_ref(y) over whole completions y that the model itself sampled, an unbiased
    estimate where `eval.temperature` is 1; per token it is the sum of these over the number of all tokens, with EOS.
    """
    if not all(map(math.isfinite, [*own, *under_ref])) or not own:
        return dict.fromkeys(("kl", "kl_per_token", "perplexity"))
    kl = math.fsum(p - q for p, q in zip(own, under_ref, strict=True))
    return {"kl": kl / len(own), "kl_per_token": kl / tokens, "perplexity": perplexity(under_ref, tokens)}
