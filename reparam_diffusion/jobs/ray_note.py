"""What is known of a run that was given to a Ray cluster: ray.json in its folder, kept fresh by jobs.ray_jobs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from reparam_diffusion.files import write_whole

WAITING_FOR_RAY = "waiting for the cluster"
"""The phase of a run whose job has not begun."""


@dataclass(frozen=True)
class RayNote:
    """A run's job. `status` is Ray's own word, or NEW before Ray has it, or SILENT when Ray answers no more."""

    job: str
    address: str
    status: str = "NEW"
    message: str = ""
    resume: bool = False

    @property
    def is_live(self) -> bool:
        """Whether Ray works on it, or will."""
        return self.waits or self.status == "RUNNING"

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.status in ("NEW", "PENDING")

    @property
    def ended(self) -> str:
        """How it ended, for a run that had no last word."""
        match self.status:
            case "STOPPED":
                return "Ray stopped the job."
            case "SUCCEEDED":
                return "The Ray job ended without a word."
            case _:
                return self.message


def read_note(folder: Path) -> RayNote | None:
    """A run's note; None for a run that Ray never had."""
    try:
        return RayNote(**json.loads((folder / "ray.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_note(folder: Path, note: RayNote) -> None:
    """Keep what is known now."""
    write_whole(folder / "ray.json", json.dumps(asdict(note), indent=1))
