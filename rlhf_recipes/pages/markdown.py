"""A comparison as markdown: for papers, terminals and issues."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from rlhf_recipes.pages.rows import (
    audit_rows,
    clean,
    cost_rows,
    difference_rows,
    finding_rows,
    held_out_rows,
    number,
    view_rows,
)

ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "\\`*[]|#~$"}
    | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    | dict.fromkeys("\n\t\u2028\u2029", " ")
)
"""Strangers' text stays on its line, in its cell, and is no markup."""


def write_markdown(comparison: dict[str, Any], file: Path) -> None:
    """Write verdict, views, held-out metrics, cost and differences, with links to the pictures beside the file.

    Args:
        comparison: What `comparison.json` holds.
        file: Where to.
    """
    comparison = clean(comparison)
    columns, held_out = held_out_rows(comparison)
    templates = Environment(
        loader=PackageLoader("rlhf_recipes.pages"), trim_blocks=True, lstrip_blocks=True, finalize=_plain
    )
    text = templates.get_template("report.md").render(
        comparison=comparison,
        algorithms=comparison["algorithms"],
        views=view_rows(comparison),
        held_out_columns=columns,
        held_out=[row for row in held_out if row["main"]],
        cost=cost_rows(comparison),
        audits=audit_rows(comparison),
        findings=finding_rows(comparison),
        differences=difference_rows(comparison),
        number=number,
    )
    file.write_text(text.strip() + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return value.translate(ESCAPES) if isinstance(value, str) else value
