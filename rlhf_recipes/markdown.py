"""A comparison as markdown."""

from pathlib import Path
from typing import Any


def write_markdown(comparison: dict[str, Any], file: Path) -> None:
    """Write a comparison for a terminal or a paper."""
    file.write_text(f"# {comparison['title']}\n\n{comparison['verdict']['sentence']}\n", encoding="utf-8")
