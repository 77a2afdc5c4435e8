"""Metrics have one list, the registry: tables, plots, bands, views and the progress bar follow from it."""

from support.places import ROOT
from support.processes import run_python

NEW_METRIC = """
from rlhf_recipes.pages import metrics

metrics.TRAINING["flair"] = metrics.Metric(
    "how lively the completions are", "flair of a rollout", section="Text", progress=True, banded=True
)
metrics.EVAL["flair"] = metrics.Metric("how lively the samples are", "flair", form="{:.2f}", swept=True)

from pathlib import Path

from rlhf_recipes.comparison.curves import BANDED
from rlhf_recipes.pages.html import write_page
from rlhf_recipes.pages.plots import draw_comparison
from rlhf_recipes.pages.tables import markdown_tables, print_models, print_sweep
from rlhf_recipes.runs.callbacks import IN_PROGRESS_BAR
from rlhf_recipes.runs.workspace import view_sections
from support.report_fixture import make_comparison

assert "flair" in BANDED and "flair" in IN_PROGRESS_BAR
assert view_sections(["vader"])["Text"][-1] == "flair" and view_sections(["vader"])["Score"][-1] == "score/vader"
assert "| `flair` | how lively the completions are |" in metrics.markdown(metrics.TRAINING)
models = {"ppo": {"score_mean": 0.5, "flair": 0.75}}
assert "| score | flair |" in markdown_tables(models) and "- flair: how lively the samples are" in markdown_tables(models)
print_models(models)
print_sweep([{"label": "a", "runs": [{}], "numbers": {"eval/flair": {"mean": 0.25, "std": None, "n": 1}}}])
comparison = make_comparison()
for run in comparison["runs"]:
    run["curves"]["flair"] = run["curves"]["score_mean"]
write_page(Path("report.html"), comparison)
draw_comparison(comparison, Path())
"""


def test_a_metric_is_one_entry_of_the_registry(tmp_path):
    done = run_python("-c", NEW_METRIC, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr
    assert "0.75" in done.stdout and "0.25" in done.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<option value="flair">flair of a rollout</option>' in page and 'id="plot-flair"' in page
    assert (tmp_path / "curves.png").is_file()
