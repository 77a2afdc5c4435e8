"""Differences between the run that a manifest describes and the run that is asked for."""

from pathlib import Path
from typing import Any

from rlhf_recipes.system.files import sha256_of


def differences(found: Any, wanted: Any, key: str = "") -> list[str]:
    """`key: found -> wanted` for every leaf in which two nested mappings differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for name in sorted(found.keys() | wanted.keys()):
            lines += differences(found.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
        return lines
    if found == wanted:
        return []
    if key.startswith("inputs."):
        return [f"stage {key.removeprefix('inputs.')} has run again since"]
    return [f"{key.removeprefix('settings.')}: {found!r} -> {wanted!r}"]


def changed_files(manifest: dict[str, Any]) -> list[str]:
    """Data files and files of user functions whose content differs from what the run last recorded."""
    sources = [part["sources"] for part in (manifest, *manifest.get("resumed", [])) if "sources" in part]
    lines = []
    for key, source in sources[-1].items() if sources else ():
        path = Path(source["path"])
        if "sha256" in source and path.is_file() and sha256_of(path) != source["sha256"]:
            lines.append(f"{key}: {path} has changed since")
    return lines
