"""The numbers of an audit: of the rollouts that a run has logged, and of its checkpoints on the same held-out prompts."""

from itertools import groupby
from typing import Any

from rlhf_recipes.evaluation.audit.changes import BINS, MAX_ROLLOUTS, MEANS, mean_of_known, spread_out
from rlhf_recipes.evaluation.audit.copying import (
    copied_share,
    copies_title,
    longest_common_run,
    template_fields,
    words,
)
from rlhf_recipes.evaluation.audit.run import START, AuditedRun, Model
from rlhf_recipes.evaluation.metrics import repeated_share
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.checked import RewardError
from rlhf_recipes.runs.files import COMPLETIONS, METRICS

PHRASE_WORDS = 2
"""Words of a phrase that counts as repeated: pairs repeat in texts of ten words too, longer phrases hardly ever."""


def logged_rollouts(run: AuditedRun) -> tuple[list[dict[str, Any]], list[str]]:
    """Logged rollouts in numbers, as many as are enough, and notes on numbers that are missing."""
    metrics = {line["step"]: line for line in run.logged(METRICS) if "score_mean" in line}
    rollouts: list[list[dict[str, Any]]] = []
    for _, group in groupby(run.logged(COMPLETIONS), key=lambda line: line["step"]):
        rollout = list(group)
        # Where each of several steps on one rollout is logged, the same completions come again.
        if not rollouts or _texts(rollout) != _texts(rollouts[-1]):
            rollouts.append(rollout)
    if not rollouts:
        return [], [f"{run.path.name} has logged no completions, so only checkpoints can be audited"]
    rollouts = spread_out(rollouts, BINS * MAX_ROLLOUTS)
    lines = [line for rollout in rollouts for line in rollout]
    held_out, notes = _held_out_scores(run, lines)
    weights = [spec.weight for spec in run.recipe.reward_funcs]
    for line, value in zip(lines, held_out, strict=True):
        terms = [w * s for w, s in zip(weights, line["scores"].values(), strict=True) if s is not None]
        line |= {"score": sum(terms) if terms else None, "held_out": value}
        line |= _of_text(run.recipe.data.prompt_template, line["prompt"], line["completion"])
    found = []
    for rollout in rollouts:
        logged = metrics.get(rollout[0]["step"], {})
        found.append(
            {
                "step": rollout[0]["step"],
                "episodes": logged.get("episodes"),
                "completions": len(rollout),
                **{name: mean_of_known([line.get(name) for line in rollout]) for name in MEANS},
                **{name: logged.get(name) for name in ("eos_rate", "entropy", "kl")},
                "pairs": [(line["length"], line["score"]) for line in rollout if line["score"] is not None],
            }
        )
    return found, notes


def _texts(rollout: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(line["prompt"], line["completion"]) for line in rollout]


def _of_text(template: str | None, prompt: Any, completion: Any) -> dict[str, Any]:
    """How much of a completion is copied from its prompt or repeated, and its length in words."""
    prompt = as_text(prompt)
    asked, said = words(prompt), words(as_text(completion))
    title = (template_fields(template, prompt) or {}).get("title") if template else None
    return {
        "length": len(said),
        "repetition": repeated_share(said, PHRASE_WORDS),
        "copied_share": copied_share(asked, said),
        "longest_common_run": longest_common_run(asked, said),
        "title_copied_share": None if title is None else copies_title(words(title), said),
    }


def _held_out_scores(run: AuditedRun, lines: list[dict[str, Any]]) -> tuple[list[float | None], list[str]]:
    """Held-out scores of logged completions, which are tokenized again: a log has no token ids.

    A completion of as many tokens as training allowed counts as cut off, a shorter one as finished.
    """
    specs = run.recipe.eval.held_out_funcs
    if not specs:
        return [None] * len(lines), []
    from rlhf_recipes.rewards.calls import score_all
    from rlhf_recipes.rewards.registry import build_reward_funcs

    tokenizer, longest = run.tokenizer(), run.new_tokens()
    ids = [tokenizer(as_text(line["completion"]), add_special_tokens=False)["input_ids"] for line in lines]
    finished = [len(row) < longest for row in ids]
    call = {
        "prompts": [line["prompt"] for line in lines],
        "completions": [line["completion"] for line in lines],
        "completion_ids": [row + [tokenizer.eos_token_id] * end for row, end in zip(ids, finished, strict=True)],
        "finished": finished,
    }
    functions = build_reward_funcs(run.recipe, specs, key="eval.held_out_funcs")
    try:
        return score_all(specs, functions, run.recipe.seed, **call)[0], []
    except RewardError as error:  # a function may need columns of the data, which no log has
        return [None] * len(lines), [f"logged completions have no held-out score: {error}"]


def measured_checkpoints(
    run: AuditedRun, models: list[Model], number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Measures every model on the same held-out prompts.

    Args:
        number: Of prompts.

    Returns:
        Rows of the table, the scores of every model prompt by prompt, and notes on models that are left out.
    """
    from tqdm import tqdm

    from rlhf_recipes.evaluation.evaluator import Evaluator, held_out_prompts
    from rlhf_recipes.runs.references import resolve_model

    notes = []
    try:
        resolve_model(run.recipe, START, run.settings.policy)
    except RecipeError as error:
        notes.append(f"start is left out; without the policy that training started from there is no KL: {error}")
        models = models[1:]
    if not models:
        return [], [], notes
    ids = {model.name: model.id for model in models}
    tokenizer, trusted = run.tokenizer(), list(run.recipe.trust_remote_code)
    if run.settings.policy in trusted:
        trusted += ids.values()
    # Without the start any model is the reference: the KL is not shown.
    asked = {"models": ids, "reference": models[0].name, "num_prompts": number, "perplexity_model": None}
    settings = run.recipe.eval.model_copy(update=asked)
    recipe = run.recipe.model_copy(update={"eval": settings, "trust_remote_code": trusted})
    try:
        rows = held_out_prompts(recipe, tokenizer)
        new_tokens = settings.max_new_tokens or run.new_tokens()
        evaluator = Evaluator(recipe, dict.fromkeys(ids, tokenizer), rows, new_tokens)
    except RecipeError as error:  # the data or a reward function is gone; the log can still be audited
        return [], [], [*notes, f"checkpoints are left out: {error}"]
    table, scores = [], []
    with tqdm(total=len(models) * len(rows), desc="audit  ", unit="completion", disable=None, leave=False) as bar:
        for model in models:
            try:
                part = evaluator.measure(model.name, bar.update)
            except RecipeError as error:
                notes.append(f"{model.name} is left out: {error}")
                continue
            answers, metrics = part["answers"], part["metrics"]
            template = recipe.data.prompt_template
            texts = [_of_text(template, p, a["completion"]) for p, a in zip(evaluator.prompts, answers, strict=True)]
            table.append(
                {
                    "name": model.name,
                    "step": model.step,
                    "score_mean": metrics["score_mean"],
                    "held_out_mean": metrics.get("held_out_mean"),
                    "kl": metrics["kl"] if START in ids else None,
                    "eos_rate": metrics["eos_rate"],
                    **{key: mean_of_known([text[key] for text in texts]) for key in texts[0]},
                }
            )
            by_prompt = {key: [answer.get(key) for answer in answers] for key in ("score", "held_out")}
            scores.append({"name": model.name} | by_prompt)
    return table, scores, notes
