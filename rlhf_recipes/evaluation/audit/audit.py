"""Audits runs of ppo and rloo, finished or stopped: has training raised the score without what the score stands for?

    rlhf-recipes audit runs/imdb_tiny/ppo runs/imdb_tiny/rloo

Reads a run's logs (`metrics.jsonl`, `completions.jsonl`), and measures its checkpoints on the same held-out prompts.
Writes `../audit/<stage>.json`. docs/audit.md describes the signs and the reasons for their thresholds. An audit finds
signs only: no sign is no proof.
"""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.evaluation.audit.changes import split, summary
from rlhf_recipes.evaluation.audit.measure import logged_rollouts, measured_checkpoints
from rlhf_recipes.evaluation.audit.run import START, AuditedRun, Model, open_run
from rlhf_recipes.evaluation.audit.signs import Peak, signs_in_checkpoints, signs_in_log
from rlhf_recipes.launch.setup import prepare
from rlhf_recipes.pages.metrics import AUDIT, Metric
from rlhf_recipes.pages.tables import cells
from rlhf_recipes.runs.files import audit_file, read_manifest, run_path
from rlhf_recipes.runs.inputs import go_offline, hub_references
from rlhf_recipes.system.files import write_whole, writing
from rlhf_recipes.system.terminal import hush_libraries, log_to, print_table, say

NOTHING = "nothing found by this audit, which is no proof that there is nothing: read some completions, too"

MIN_CHECKPOINTS = 3
"""With fewer checkpoints, the final model among them, the log says when the held-out score was highest."""

CHECKPOINT = {
    "name": Metric("folder of the checkpoint", form="{}"),
    "step": AUDIT["step"],
    "score_mean": AUDIT["score"],
    "held_out_mean": AUDIT["held_out"],
    **AUDIT,
}
"""Columns of the table of checkpoints; those without a value are left out."""

LEGEND = (
    "trained: weighted sum of reward_funcs; held out: of eval.held_out_funcs, which training did not see",
    "length~score: rank correlation; repeated: word pairs that repeat; run, copied, title: taken from the prompt",
)


def audit_runs(paths: list[Path], prompts: int) -> dict[Path, dict[str, Any]]:
    """Audit runs, and write the result beside each.

    Args:
        paths: Folders of runs of ppo and rloo.
        prompts: Held-out prompts for every checkpoint; 0: only the log is read, and only reward models are loaded.

    Returns:
        By path, the content of its `audit/<stage>.json`.

    Raises:
        RecipeError: A folder holds no run of ppo or rloo, or a held-out reward function cannot be made.
    """
    log_to(None)
    prepare()
    runs = {path: open_run(path) for path in paths}
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


def print_audit(found: dict[str, Any]) -> None:
    """Print one audit: a table of the training, one of the checkpoints, and the findings as sentences."""
    say(f"\n{found['run']}")
    for rows, columns in ((found["bins"], AUDIT), (found["checkpoints"], CHECKPOINT)):
        shown = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
        if rows:
            print_table([column.heading for column in shown.values()], [cells(row, shown) for row in rows])
    for line in LEGEND:
        say(line)
    for i, sentence in enumerate(found["findings"]):
        say(f"{'sign:' if i < found['signs'] else 'note:'} {sentence}")


def _audit(run: AuditedRun, prompts: int) -> dict[str, Any]:
    models = run.models()
    rollouts, notes = logged_rollouts(run)
    parts = split(rollouts)
    bins = [summary(part) for part in parts if part]
    if len(bins) == 1:
        notes.append(
            f"only {len(rollouts)} rollouts were logged, which is too few to compare parts of the training: set "
            f"{run.stage}.trainer.logging_steps lower"
        )
    if run.held_out_name is None:
        notes.append(
            "no held-out score: set eval.held_out_funcs to reward functions that training does not see; without one, an "
            "audit sees length, copying and repetition, and not whether the score still means anything"
        )
    if run.manifest["status"] == "failed":
        notes.insert(0, f"the run failed: {run.manifest.get('error', 'no reason known')}")
    highest, signs = signs_in_log(parts)
    signs = [*run.manifest.get("findings", []), *signs]
    peak = None
    if highest is not None:
        peak = _peak_of_log(highest, bins, models)
        below = "" if highest.above_end else ", which is within noise of it"
        notes.insert(
            0,
            f"in logged completions the held-out score is highest about step {peak['step']} ({peak['held_out']:.2f}; "
            f"checkpoint: {peak['checkpoint'] or 'none kept'}); at the end it is {bins[-1]['held_out']:.2f}{below}",
        )
    table, scores, left_out = measured_checkpoints(run, models, prompts) if prompts else ([], [], [])
    notes += left_out
    if run.held_out_name is not None and len(scores) > 1:
        best, more_signs, more_notes = signs_in_checkpoints(scores)
        signs, notes = more_signs + signs, more_notes + notes
        trained = sum(row["name"] != START for row in table)
        if best is not None and (peak is None or trained >= MIN_CHECKPOINTS):
            row = table[best.index]
            peak = {
                "step": row["step"],
                "checkpoint": row["name"],
                "held_out": row["held_out_mean"],
                "by": "checkpoints",
                "above_end": best.above_end,
            }
    notes += _hints(run, models) + _changed_inputs(run)
    return {
        "run": str(run.path),
        "id": run.manifest["id"],
        "stage": run.stage,
        "held_out_name": run.held_out_name,
        "prompts": prompts,
        "bins": bins,
        "checkpoints": table,
        "peak": peak,
        "signs": len(signs),
        "findings": (signs or [NOTHING]) + notes,
    }


def _peak_of_log(highest: Peak, bins: list[dict[str, Any]], models: list[Model]) -> dict[str, Any]:
    """The part with the highest held-out score, and the last checkpoint that was saved in it."""
    first, last = (bins[highest.index - 1]["step"] if highest.index else 0), bins[highest.index]["step"]
    inside = [model.name for model in models if first < model.step <= last]
    return {
        "step": last,
        "checkpoint": inside[-1] if inside else None,
        "held_out": bins[highest.index]["held_out"],
        "by": "completions",
        "above_end": highest.above_end,
    }


def _hints(run: AuditedRun, models: list[Model]) -> list[str]:
    """Names the keys that keep checkpoints for a comparison, if the run has kept only its last ones."""
    trained = [model for model in models if model.name != START]
    steps = [model.step for model in trained]
    if run.settings.keep_best or (len(trained) >= MIN_CHECKPOINTS and min(steps) <= max(steps) / 2):
        return []
    there = ", ".join(model.name for model in trained) or "none"
    return [
        f"models that this run has kept: {there}; the one with the highest held-out score may be gone: train with "
        f"{run.stage}.keep_best=held_out_mean to keep it as the final model, or with {run.stage}.trainer.save_total_limit=null "
        f"to keep every one, and {run.stage}.trainer.save_steps=0.1 for ten"
    ]


def _changed_inputs(run: AuditedRun) -> list[str]:
    """Sentences on stages that have been run again since this run used them."""
    found = []
    for stage, run_id in run.manifest["inputs"].items():
        beside = read_manifest(run_path(run.recipe, stage))
        if beside is not None and beside["id"] != run_id:
            found.append(f"stage {stage} was run again since: this run was trained with its earlier result")
    return found
