"""The graph of a recipe: the stages that it runs, the stages that each one needs, and the models that eval measures."""

from typing import Any

from rlhf_recipes.recipe.schema import ON_POLICY, TRAINED, Recipe, RecipeError

COMMON_SETTINGS = ("seed", "data", "special_tokens", "chat_template_kwargs", "trust_remote_code")
SETTINGS = {
    "sft": (*COMMON_SETTINGS, "sft"),
    "reward": (*COMMON_SETTINGS, "reward"),
    "eval": (*COMMON_SETTINGS, "reward_funcs", "eval"),
    "compare": ("eval",),
}
"""Stage -> the parts of a recipe that its result depends on; on-policy stages have `ON_POLICY_SETTINGS`."""

ON_POLICY_SETTINGS = (*COMMON_SETTINGS, "reward_funcs", "missing_eos", "episodes")
"""The parts of a recipe that an on-policy stage depends on, in addition to its own section."""


def sections_of(stage: str) -> tuple[str, ...]:
    """The parts of a recipe that a stage's result depends on."""
    return SETTINGS.get(stage, (*ON_POLICY_SETTINGS, stage))


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The values of `sections_of` a stage; for eval, also the models that it measures."""
    values = recipe.model_dump(include=set(sections_of(stage)), exclude_none=True)
    if stage == "eval":
        values |= {"models": eval_models(recipe), "reference": eval_reference(recipe)}
        if recipe.eval.max_new_tokens is None:
            values["max_completion_length"] = training_length(recipe)
    return values


def eval_models(recipe: Recipe) -> dict[str, str]:
    """Name -> model id of the models that `eval` measures."""
    if recipe.eval.models is not None:
        return dict(recipe.eval.models)
    trained = recipe.on_policy_stages()
    start = getattr(recipe, trained[0]).policy if trained else "stage:sft"
    base = recipe.sft.model if recipe.sft is not None and start == "stage:sft" else None
    return ({"base": base} if base else {}) | {"sft": start} | {stage: f"stage:{stage}" for stage in trained}


def eval_reference(recipe: Recipe) -> str:
    """The name in `eval_models` that KL and perplexity refer to.

    Raises:
        RecipeError: `eval.reference` is no such name.
    """
    models, given = eval_models(recipe), recipe.eval.reference
    if given is not None and given not in models:
        raise RecipeError(f"eval.reference: {given} is not in eval.models; they are: {', '.join(models)}.")
    return given or ("sft" if "sft" in models else next(iter(models)))


def training_length(recipe: Recipe, stages: tuple[str, ...] = ON_POLICY) -> int | None:
    """Longest completion in training, from the first of these stages that sets it. None: TRL's default."""
    trainers = [getattr(recipe, stage).trainer for stage in stages if getattr(recipe, stage) is not None]
    return next((t["max_completion_length"] for t in trainers if "max_completion_length" in t), None)


def stages_to_run(recipe: Recipe) -> list[str]:
    """Stages that the comparison needs, in order.

    A recipe without an on-policy stage has nothing to compare: all its stages that train run.
    """
    if not recipe.on_policy_stages():
        return [stage for stage in recipe.stages() if stage in TRAINED]
    needed, waiting = set(), ["compare"]
    while waiting:
        stage = waiting.pop()
        if stage not in needed:
            needed.add(stage)
            waiting += input_stages(recipe, stage)
    return [stage for stage in recipe.stages() if stage in needed]


def input_stages(recipe: Recipe, stage: str) -> list[str]:
    """Stages whose results a stage needs: the `stage:` references in its settings; for compare, the stages that it shows."""
    found = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str) and value.startswith("stage:"):
            found.add(value.removeprefix("stage:"))

    walk(stage_settings(recipe, stage))
    if stage == "compare":
        found |= set(recipe.stages()) & {*ON_POLICY, "eval"}
    return sorted(found)
