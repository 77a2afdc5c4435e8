"""The notebooks: they run from the first cell to the last, offline, and nothing of a run is kept in them.

All of them together are to take at most 4 minutes on 2 CPU cores.
"""

import json
import os
from pathlib import Path

import nbformat
import pytest

from support.places import ROOT
from support.report_fixture import make_comparison

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert "quickstart" in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert not cell.metadata, "a cell has metadata of somebody's editor"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert text == nbformat.writes(notebook) + "\n"  # what an editor would write: no diffs by form


def execute(path: Path, folder: Path, monkeypatch) -> list:
    """Outputs of all cells, run by a kernel that begins in a folder."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parent.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": folder}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    return [output for cell in code for output in cell.outputs]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    outputs = execute(path, tmp_path, monkeypatch)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture was drawn"
    said = [(output.name, output.text) for output in outputs if output.output_type == "stream"]
    assert not [text for name, text in said if name == "stderr" or "WARNING" in text], "a newcomer reads warnings first"


def test_a_duel_of_which_a_run_failed_is_read(tmp_path, monkeypatch):
    duel = make_comparison()
    scores = duel["held_out"]["metrics"]["score_mean"]
    (failed,) = [i for i, run in enumerate(duel["runs"]) if run["name"] == "rloo seed 43"]
    del duel["runs"][failed], duel["frontier"][failed], scores["rloo"]["values"][1]
    folder = tmp_path / "runs" / "imdb_tiny" / "duel"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(duel), encoding="utf-8")
    (path,) = [path for path in NOTEBOOKS if path.stem == "ppo_vs_rloo"]
    said = "".join(output.get("text", "") for output in execute(path, tmp_path, monkeypatch))
    ppo, rloo = scores["ppo"]["values"], scores["rloo"]["values"]
    assert f"differences: [{round(ppo[0] - rloo[0], 3)}, {round(ppo[2] - rloo[1], 3)}]" in said  # seeds 42 and 44
