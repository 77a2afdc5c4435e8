"""Measures models on held-out prompts: completions, scores, KL and perplexity, each model as if it were the only one."""

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

if TYPE_CHECKING:
    from datasets import Dataset

    from rlhf_recipes.models.samples import Samples


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


def longest_in_training(recipe: Recipe, stages: tuple[str, ...] = ON_POLICY) -> int:
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


def _load(recipe: Recipe, key: str, reference: str, tokenizer: Any) -> Any:
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, set_seed

    from rlhf_recipes.models.limits import fit_embeddings
    from rlhf_recipes.models.load import load_model
    from rlhf_recipes.runs.references import resolve_model

    folder = resolve_model(recipe, key, reference)
    model = load_model(AutoModelForCausalLM, key, folder, reference in recipe.trust_remote_code, dtype="auto")
    set_seed(recipe.seed)  # new rows of the embeddings are random
    fit_embeddings(key, model, tokenizer)
    return model.to(PartialState().device).eval()


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
