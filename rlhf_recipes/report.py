"""One self-contained HTML page about a comparison."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader


def write_page(file: Path, comparison: dict[str, Any]) -> None:
    """Write one self-contained HTML page.

    Args:
        file: Where to.
        comparison: See `comparison.py`.
    """
    # Completions are data: whatever a model writes is escaped.
    templates = Environment(loader=PackageLoader("rlhf_recipes"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    file.write_text(templates.get_template("report.html").render(comparison), encoding="utf-8")
