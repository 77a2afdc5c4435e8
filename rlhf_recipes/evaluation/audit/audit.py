"""Audit of runs of ppo and rloo, finished or stopped: has the score been raised, or what it stands for?

    rlhf-recipes audit runs/imdb_tiny/ppo runs/imdb_tiny/rloo

Reads a run's folder: what training logged (`metrics.jsonl`, `completions.jsonl`) and its checkpoints, which all get the
same held-out prompts. Writes `../audit/<stage>.json`. What is looked for, and where the thresholds come from, is in
docs/audit.md; what is found are signs, and to find none is no proof.
"""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.evaluation.audit import signs as hacking
from rlhf_recipes.evaluation.audit.copying import (
    copied_share,
    copies_title,
    longest_common_run,
    repeated_share,
    template_fields,
    words,
)
from rlhf_recipes.evaluation.audit.signs import mean_of_known
from rlhf_recipes.launch.setup import prepare
from rlhf_recipes.pages.metrics import AUDIT, Metric
from rlhf_recipes.pages.tables import cells
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.rewards.calls import RewardError
from rlhf_recipes.runs.files import audit_file, read_audit, read_manifest, run_path
from rlhf_recipes.runs.inputs import go_offline, hub_references
from rlhf_recipes.system.files import MARKER, checkpoints, read_lines, step_of, write_whole, writing
from rlhf_recipes.system.terminal import hush_libraries, log_to, print_table, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING = "nothing found by this audit, which is no proof that there is nothing: read some completions, too"

MIN_CHECKPOINTS = 3
"""Checkpoints, the final model among them, below which they are too few to say when the held-out score was highest."""

CHECKPOINT = {
    "name": Metric("folder of the checkpoint", form="{}"),
    "step": AUDIT["step"],
    "score_mean": AUDIT["score"],
    "held_out_mean": AUDIT["held_out"],
    **{key: AUDIT[key] for key in ("kl", "eos_rate", "length", "repetition", "longest_common_run")},
    **{key: AUDIT[key] for key in ("copied_share", "title_copied_share")},
}
"""Of a checkpoint, in the table; columns without a value in any row are left out."""

SCORED = (
    "trained: weighted sum of reward_funcs; held out: of eval.held_out_funcs, which training did not see",
    "length~score: rank correlation; repeated: word pairs that repeat; run, copied, title: taken from the prompt",
)


@dataclass
class Audited:
    """A run to be audited: its folder, its recipe with `stage:` references that lead to the folders beside it."""

    path: Path
    stage: str
    recipe: Recipe
    manifest: dict[str, Any]

    @property
    def settings(self) -> Any:
        return getattr(self.recipe, self.stage)

    @property
    def held_out_name(self) -> str | None:
        """Name of the held-out score; None without one."""
        return " + ".join(spec.name.rpartition(":")[2] for spec in self.recipe.eval.held_out_funcs) or None

    @property
    def is_finished(self) -> bool:
        return self.manifest["status"] == "finished"

    def new_tokens(self) -> int:
        """Longest completion in training."""
        from rlhf_recipes.evaluation.evaluator import longest_in_training

        return longest_in_training(self.recipe, (self.stage,))

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The run's own; of one that has not finished, that of the policy, from which it would go on."""
        from rlhf_recipes.data.tokenizer import load_tokenizer

        return load_tokenizer(self.recipe, self.stage, str(self.path) if self.is_finished else self.settings.policy)

    def models(self) -> list[tuple[str, int, str]]:
        """Name, step and reference of the policy at the start, of every whole checkpoint, and of the final model."""
        whole = [path for path in checkpoints(self.path) if (path / MARKER).is_file()]
        logged = [line["step"] for line in _lines(self.path / "metrics.jsonl")]
        last = max([0, *logged, *map(step_of, whole)])
        if self.is_finished:
            whole = [path for path in whole if step_of(path) < last]  # that of the last step is the final model
        found = [("start", 0, self.settings.policy)] + [(path.name, step_of(path), str(path)) for path in whole]
        return found + ([("final", last, str(self.path))] if self.is_finished else [])


def audit_runs(paths: list[Path], prompts: int) -> dict[Path, dict[str, Any]]:
    """Audit runs, and write what was found beside each.

    Args:
        paths: Folders of runs of ppo and rloo.
        prompts: Held-out prompts for every checkpoint; 0: only the log is read, and no model is loaded but judges.

    Returns:
        By path, the content of its `audit/<stage>.json`.

    Raises:
        RecipeError: A folder holds no run of ppo or rloo, or a held-out reward function cannot be had.
    """
    log_to(None)
    prepare()
    runs = {path: _open(path) for path in paths}
    if any(hub_references(run.recipe, stage) for run in runs.values() for stage in (run.stage, "eval")):
        go_offline()
    hush_libraries()
    found = {}
    for path, run in runs.items():
        found[path] = _audit(run, prompts)
        file = audit_file(run.path)
        with writing("the audit", file):
            file.parent.mkdir(exist_ok=True)
            write_whole(file, json.dumps(found[path], indent=2, ensure_ascii=False))
    return found


def is_audited(path: Path) -> bool:
    """Whether the run that is in a folder now has been audited."""
    return read_audit(path) is not None


def print_audit(found: dict[str, Any]) -> None:
    """Print one audit: a table of the training, one of the checkpoints, and the findings as sentences."""
    say(f"\n{found['run']}")
    for rows, columns in ((found["bins"], AUDIT), (found["checkpoints"], CHECKPOINT)):
        shown = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
        if rows:
            print_table([column.heading for column in shown.values()], [cells(row, shown) for row in rows])
    for line in SCORED:
        say(line)
    for i, sentence in enumerate(found["findings"]):
        say(f"{'sign:' if i < found['signs'] else 'note:'} {sentence}")


def _open(path: Path) -> Audited:
    manifest = read_manifest(path)
    stage = (manifest or {}).get("stage")
    if stage not in ("ppo", "rloo"):
        what = "is no run" if manifest is None else f"is a run of stage {stage}"
        raise RecipeError(f"{path} {what}; name the folder of a run of ppo or rloo, such as runs/imdb_tiny/ppo.")
    folder = path.resolve()
    recipe = load_recipe(str(folder / "recipe.yaml"))
    # As its folder stands now, which may have been moved: what it names `stage:sft` is the folder beside it.
    recipe = recipe.model_copy(update={"runs_dir": str(folder.parent.parent), "name": folder.parent.name})
    return Audited(folder, stage, recipe, manifest)


def _audit(run: Audited, prompts: int) -> dict[str, Any]:
    from rlhf_recipes.rewards.registry import build_reward_funcs

    models = run.models()
    # Not kept: a judge may be a large model, and checkpoints are judged by one of their own.
    moments, notes = _moments(
        run, build_reward_funcs(run.recipe, run.recipe.eval.held_out_funcs, key="eval.held_out_funcs")
    )
    parts = hacking.split(moments)
    if moments and len(parts) == 1:
        notes.append(
            f"only {len(moments)} rollouts were logged, which is too few to compare parts of the training: set "
            f"{run.stage}.trainer.logging_steps lower"
        )
    if run.held_out_name is None:
        notes.append(
            "no held-out score: set eval.held_out_funcs to reward functions that training does not see; without one, an "
            "audit sees length, copying and repetition, and not whether the score still means anything"
        )
    at, signs = hacking.of_log(parts)
    bins = [hacking.summary(part) for part in parts if part]
    peak = at and _peak_of_log(at, bins, models)
    if peak is not None:
        below = "" if at.above_end else ", which is within noise of it"
        notes.insert(
            0,
            f"in logged completions the held-out score is highest about step {peak['step']} ({peak['held_out']:.2f}; "
            f"checkpoint: {peak['checkpoint'] or 'none kept'}); at the end it is {bins[-1]['held_out']:.2f}{below}",
        )
    measured, answers, more = _checkpoints(run, models, prompts) if prompts else ([], [], [])
    notes += more
    if run.held_out_name is not None and len(answers) > 1:
        best, more_signs, more = hacking.of_checkpoints(answers)
        signs, notes = more_signs + signs, more + notes
        if best is not None and (peak is None or sum(row["name"] != "start" for row in measured) >= MIN_CHECKPOINTS):
            row = measured[best.index]
            peak = {
                "step": row["step"],
                "checkpoint": row["name"],
                "held_out": row["held_out_mean"],
                "by": "checkpoints",
            }
            peak["above_end"] = best.above_end
    notes += _hints(run, models) + _changed_inputs(run)
    return {
        "run": str(run.path),
        "id": run.manifest["id"],
        "stage": run.stage,
        "held_out_name": run.held_out_name,
        "prompts": prompts,
        "bins": bins,
        "checkpoints": measured,
        "peak": peak,
        "signs": len(signs),
        "findings": (signs or [NOTHING]) + notes,
    }


def _peak_of_log(at: hacking.Peak, bins: list[dict[str, Any]], models: list[tuple[str, int, str]]) -> dict[str, Any]:
    """The part with the highest held-out score, and the last checkpoint that was saved in it."""
    first, last = (bins[at.index - 1]["step"] if at.index else 0), bins[at.index]["step"]
    inside = [name for name, step, _ in models if first < step <= last]
    return {
        "step": last,
        "checkpoint": inside[-1] if inside else None,
        "held_out": bins[at.index]["held_out"],
        "by": "completions",
        "above_end": at.above_end,
    }


def _moments(run: Audited, judges: list) -> tuple[list[dict[str, Any]], list[str]]:
    """Every logged rollout, or as many as are enough, in numbers; and notes on what could not be told."""
    metrics = {line["step"]: line for line in _lines(run.path / "metrics.jsonl") if "score_mean" in line}
    groups: list[list[dict[str, Any]]] = []
    for _, group in groupby(_lines(run.path / "completions.jsonl"), key=lambda line: line["step"]):
        rollout = list(group)
        # Steps of one rollout, where each is logged: the same completions again.
        if not groups or _texts(rollout) != _texts(groups[-1]):
            groups.append(rollout)
    if not groups:
        return [], [f"{run.path.name} has logged no completions, so only checkpoints can be audited"]
    groups = hacking.spread_out(groups, hacking.BINS * hacking.MOST_MOMENTS)
    lines = [line for group in groups for line in group]
    judged, notes = _judge_log(run, judges, lines)
    weights = [spec.weight for spec in run.recipe.reward_funcs]
    for line, held_out in zip(lines, judged, strict=True):
        terms = [w * s for w, s in zip(weights, line["scores"].values(), strict=True) if s is not None]
        line |= {"score": sum(terms) if terms else None, "held_out": held_out}
        line |= _of_text(run.recipe.data.prompt_template, line["prompt"], line["completion"])
    moments = []
    for group in groups:
        logged = metrics.get(group[0]["step"], {})
        means = {name: mean_of_known([line.get(name) for line in group]) for name in hacking.MEANS}
        means |= {name: logged.get(name) for name in ("eos_rate", "entropy", "kl")}
        pairs = [(line["length"], line["score"]) for line in group if line["score"] is not None]
        place = {"step": group[0]["step"], "episodes": logged.get("episodes"), "completions": len(group)}
        moments.append(place | means | {"pairs": pairs})
    return moments, notes


def _lines(file: Path) -> list[dict[str, Any]]:
    """Lines of a jsonl file; none without it, and not the last one of a run that was killed while it wrote."""
    if not file.is_file():
        return []
    return read_lines(file, drop_torn=True)


def _texts(rollout: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(line["prompt"], line["completion"]) for line in rollout]


def _of_text(template: str | None, prompt: Any, completion: Any) -> dict[str, Any]:
    """Text that a completion copies from its prompt, and text that it repeats; lengths in words."""
    prompt = as_text(prompt)
    asked, said = words(prompt), words(as_text(completion))
    title = (template_fields(template, prompt) or {}).get("title") if template else None
    return {
        "length": len(said),
        "repetition": repeated_share(said),
        "copied_share": copied_share(asked, said),
        "longest_common_run": longest_common_run(asked, said),
        "title_copied_share": None if title is None else copies_title(words(title), said),
    }


def _judge_log(run: Audited, judges: list, lines: list[dict[str, Any]]) -> tuple[list[float | None], list[str]]:
    """Held-out scores of logged completions, which have no token ids any more: they are tokenized again.

    One that has as many tokens as training allowed counts as cut off, a shorter one as finished.
    """
    if not judges:
        return [None] * len(lines), []
    from rlhf_recipes.rewards.calls import score_all

    tokenizer = run.tokenizer()
    longest = run.new_tokens()
    ids = [tokenizer(as_text(line["completion"]), add_special_tokens=False)["input_ids"] for line in lines]
    finished = [len(row) < longest for row in ids]
    call = {
        "prompts": [line["prompt"] for line in lines],
        "completions": [line["completion"] for line in lines],
        "completion_ids": [row + [tokenizer.eos_token_id] * end for row, end in zip(ids, finished, strict=True)],
        "finished": finished,
    }
    try:
        return score_all(run.recipe.eval.held_out_funcs, judges, **call)[0], []
    except RewardError as error:  # it may want columns of the data, which no log has
        return [None] * len(lines), [f"logged completions have no held-out score: {error}"]


def _checkpoints(
    run: Audited, models: list[tuple[str, int, str]], number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Every model on the same held-out prompts: its row of the table, its scores prompt by prompt, and notes."""
    from tqdm import tqdm

    from rlhf_recipes.evaluation.evaluator import Evaluator, held_out_prompts
    from rlhf_recipes.runs.references import resolve_model

    notes = []
    try:
        resolve_model(run.recipe, *models[0][::2])
    except RecipeError as error:
        notes.append(f"start is left out; without the policy that training started from there is no KL: {error}")
        models = models[1:]
    if not models:
        return [], [], notes
    steps, references = ({name: entry[i] for name, *entry in models} for i in (0, 1))
    tokenizer, trusted = run.tokenizer(), list(run.recipe.trust_remote_code)
    if run.settings.policy in trusted:
        trusted += references.values()
    # Without the start the reference is any: its KL is not shown.
    asked = {"models": references, "reference": models[0][0], "num_prompts": number, "perplexity_model": None}
    settings = run.recipe.eval.model_copy(update=asked)
    recipe = run.recipe.model_copy(update={"eval": settings, "trust_remote_code": trusted})
    try:
        rows = held_out_prompts(recipe, tokenizer)
        new_tokens = settings.max_new_tokens or run.new_tokens()
        evaluator = Evaluator(recipe, dict.fromkeys(references, tokenizer), rows, new_tokens)
    except RecipeError as error:  # data or a reward function is gone: the log is still there to be audited
        return [], [], [*notes, f"checkpoints are left out: {error}"]
    measured, answers = [], []
    with tqdm(total=len(models) * len(rows), desc="audit  ", unit="completion", disable=None, leave=False) as bar:
        for name in references:
            try:
                part = evaluator.measure(name, bar.update)
            except RecipeError as error:
                notes.append(f"{name} is left out: {error}")
                continue
            said, metrics = part["answers"], part["metrics"]
            template = recipe.data.prompt_template
            texts = [_of_text(template, p, a["completion"]) for p, a in zip(evaluator.prompts, said, strict=True)]
            measured.append(
                {
                    "name": name,
                    "step": steps[name],
                    "score_mean": metrics["score_mean"],
                    "held_out_mean": metrics.get("held_out_mean"),
                    "kl": metrics["kl"] if "start" in references else None,
                    "eos_rate": metrics["eos_rate"],
                    **{key: mean_of_known([text[key] for text in texts]) for key in texts[0]},
                }
            )
            scores, judged = ([answer.get(key) for answer in said] for key in ("score", "held_out"))
            answers.append({"name": name, "scores": scores, "judged": judged})
    return measured, answers, notes


def _hints(run: Audited, models: list[tuple[str, int, str]]) -> list[str]:
    """Says which keys to set to keep checkpoints for a comparison, if only the last ones were kept."""
    trained = [step for name, step, _ in models if name != "start"]
    if len(trained) >= MIN_CHECKPOINTS and min(trained) <= max(trained) / 2:
        return []
    there = ", ".join(name for name, _, _ in models if name != "start") or "none"
    return [
        f"models that this run has kept: {there}; the one with the highest held-out score may be gone: train with "
        f"{run.stage}.trainer.save_total_limit=null to keep every one, and {run.stage}.trainer.save_steps=0.1 for ten"
    ]


def _changed_inputs(run: Audited) -> list[str]:
    """Stages beside the run that are not those any more that it was made from."""
    found = []
    for stage, run_id in run.manifest["inputs"].items():
        beside = read_manifest(run_path(run.recipe, stage))
        if beside is not None and beside["id"] != run_id:
            found.append(f"stage {stage} was run again since: what refers to it is not what this run was trained with")
    return found
