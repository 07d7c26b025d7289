"""The base models that a workspace knows: the starter, and what lies in workspace/models/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownModel:
    """A base model by the name and the path that `load_model` takes. `kind` is a plain word."""

    title: str
    path: str
    kind: str


def known_models(workspace: Path) -> list[KnownModel]:
    """The starter model first, then folders and single files in workspace/models/, by name."""
    found = [KnownModel("Starter (3D icons)", "starter", "bundled")]
    home = workspace / "models"
    for entry in sorted(home.iterdir()) if home.is_dir() else []:
        if (entry / "model_index.json").is_file():
            found.append(KnownModel(entry.name, str(entry), "folder"))
        elif entry.suffix == ".safetensors" and entry.is_file():
            found.append(KnownModel(entry.stem, str(entry), "single file"))
    return found
