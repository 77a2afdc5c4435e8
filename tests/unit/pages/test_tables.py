"""Tables on a terminal of any width and in markdown show every number, and nothing else."""

import re

import pytest

from rlhf_recipes.pages.tables import COLUMNS, cells, markdown_tables, print_models

MODELS = {
    "sft": {key: 0.125 + i / 1000 for i, key in enumerate(COLUMNS)},
    "a model with a long name": {key: 1234.5 + i for i, key in enumerate(COLUMNS)},
}


@pytest.mark.parametrize("width", [20, 40, 80, 100, 160, 400])
def test_no_number_is_cut_off_and_none_wraps(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    print_models(MODELS, ["A note."])
    out = capsys.readouterr().out
    *tables, last = out.strip().split("\n\n")
    last, note = last.rsplit("\n", 1)
    assert note == "A note."
    found = {name: [] for name in MODELS}
    for table in [*tables, last]:
        head, *rows = table.splitlines()
        assert len(rows) == len(MODELS)
        for name, row in zip(MODELS, rows, strict=True):
            assert row.startswith(name)
            found[name] += row.removeprefix(name).split()
        fits = max(map(len, [head, *rows])) <= width
        assert fits or len(rows[0].removeprefix("sft").split()) == 1  # unless a name and one number are wider
    assert found == {name: cells(metrics, COLUMNS) for name, metrics in MODELS.items()}
    assert len(tables) + 1 == 2 or width < 160
    assert all(heading in out for heading in (column.heading for column in COLUMNS.values()))


def test_text_metrics_stand_apart_and_what_is_not_known_is_blank(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_models(
        {"sft": {"score_mean": 1.0, "kl": 0.0, "length_mean": 3.0}, "x [red]": {"score_mean": 2.0, "kl": None}}
    )
    first, second = capsys.readouterr().out.strip("\n").split("\n\n")
    assert [row.split() for row in first.splitlines()] == [
        ["score", "KL"],
        ["sft", "1.00", "0.0"],
        ["x", "[red]", "2.00"],
    ]
    assert [line.split() for line in second.splitlines()] == [["length"], ["sft", "3.0"], ["x", "[red]"]]


def test_what_a_default_recipe_measures_fits_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    absent = ("rouge1", "rouge2", "rougeL", "perplexity_other")
    print_models({name: {key: 0.5 for key in COLUMNS if key not in absent} for name in ("base", "rloo")})
    assert capsys.readouterr().out.count("base") == 2


def test_markdown_has_the_same_numbers_and_names_cannot_break_it():
    evil = "<b>|`x`\n# y"
    text = markdown_tables({"sft": MODELS["sft"], evil: MODELS["sft"]}, ["a | note <script>"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * 4 and not re.search(r"(?<!\\)<", text) and "\n#" not in text
    of_text = [key for key, column in COLUMNS.items() if column.of_text]
    for rows_of_table, keys in ((rows[:4], [k for k in COLUMNS if k not in of_text]), (rows[4:], of_text)):
        head, rule, sft, other = (re.split(r"(?<!\\)\|", row)[1:-1] for row in rows_of_table)
        assert len(head) == len(rule) == len(sft) == len(other) == 1 + len(keys)
        assert [cell.strip() for cell in sft[1:]] == cells(MODELS["sft"], {key: COLUMNS[key] for key in keys})
        assert [cell.strip() for cell in head[1:]] == [COLUMNS[key].heading for key in keys]
    assert text.endswith("a \\| note \\<script\\>\n")
