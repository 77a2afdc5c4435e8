"""A comparison as markdown: for papers, terminals and issues."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from rlhf_recipes.pages.rows import clean, template_values

ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "\\`*[]|#~$"}
    | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    | dict.fromkeys("\n\t\u2028\u2029", " ")
)
"""Keeps texts of models and data on their line and in their cell, and their characters free of meaning in markdown."""


def write_markdown(comparison: dict[str, Any], file: Path) -> None:
    """Write verdict, views, held-out metrics, cost and differences, with links to the pictures beside the file.

    Args:
        comparison: The content of `comparison.json`.
        file: Markdown file to write.
    """
    values = template_values(clean(comparison))
    values["held_out"] = [row for row in values["held_out"] if row["main"]]
    templates = Environment(
        loader=PackageLoader("rlhf_recipes.pages"), trim_blocks=True, lstrip_blocks=True, finalize=_plain
    )
    text = templates.get_template("report.md").render(values)
    file.write_text(text.strip() + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return value.translate(ESCAPES) if isinstance(value, str) else value
