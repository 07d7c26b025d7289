"""What is known of a run while Ray has it: ray.json in its folder, kept fresh by jobs.ray_jobs, gone at its end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from reparam_diffusion.files import write_whole

WAITING_FOR_RAY = "waiting for the cluster"
"""The phase of a run whose job has not begun."""


@dataclass(frozen=True)
class RayNote:
    """A run's job. `status`: NEW before Ray was asked, ASKED until it has agreed, then Ray's own PENDING or RUNNING."""

    job: str
    address: str
    status: str = "NEW"
    resume: bool = False
    silent: bool = False
    """Whether Ray gave no answer when it was last asked: then `status` is how the run stood before."""

    @property
    def waits(self) -> bool:
        """Whether it had not begun when Ray last told."""
        return self.status != "RUNNING"

    @property
    def trouble(self) -> str:
        """A sentence where it cannot be told how the run stands."""
        if not self.silent:
            return ""
        return (
            f"Ray at {self.address} does not answer, so this is how the run was last seen; it may go on. "
            "It is watched again as soon as Ray answers: see that the cluster is up."
        )


def read_note(folder: Path) -> RayNote | None:
    """A run's note; None for a run that Ray does not have, or had for a version that kept the notes of ended ones."""
    try:
        row = json.loads((folder / "ray.json").read_text(encoding="utf-8"))
        note = RayNote(**{one.name: row[one.name] for one in fields(RayNote) if one.name in row})
    except (OSError, ValueError, TypeError):
        return None
    return note if note.status in ("NEW", "ASKED", "PENDING", "RUNNING") else None


def write_note(folder: Path, note: RayNote) -> None:
    """Keep what is known now."""
    write_whole(folder / "ray.json", json.dumps(asdict(note), indent=1))


def remove_note(folder: Path) -> None:
    """Forget the job: the run's events tell how it ended, and nothing else needs the note."""
    (folder / "ray.json").unlink(missing_ok=True)
