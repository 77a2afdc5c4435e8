"""One self-contained HTML page about finished runs."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from rlhf_recipes.tables import cells, present


def write_page(
    file: Path,
    title: str,
    picture: str,
    lengths: str | None,
    measured: dict[str, Any] | None,
    runs: dict[str, dict[str, Any]],
    notes: list[str],
) -> None:
    """Write one self-contained HTML page.

    Args:
        file: Where to.
        title: Heading.
        picture: Data URI of the curves.
        lengths: Data URI of the lengths' histograms; None when nothing was evaluated.
        measured: What `eval.json` holds; None when nothing was evaluated.
        runs: Name -> manifest.
        notes: Sentences about what the runs started from.
    """
    models = measured["models"] if measured else {}
    columns = present(models)
    page = (
        _templates()
        .get_template("report.html")
        .render(
            title=title,
            picture=picture,
            lengths=lengths,
            columns=columns,
            rows={name: cells(metrics, columns) for name, metrics in models.items()},
            measured=measured,
            samples=measured["samples"] if measured else [],
            names=list(models),
            runs=runs,
            notes=notes,
        )
    )
    file.write_text(page, encoding="utf-8")


def _templates() -> Environment:
    # Completions are data: whatever a model writes is escaped.
    return Environment(loader=PackageLoader("rlhf_recipes"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
