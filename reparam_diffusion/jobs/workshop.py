"""The workshop: one command on adapter files at a time for each folder, in a process of its own that outlives the page.

workshop/<time>-<command>/ holds request.json (the command line's own arguments), said.txt (what it printed),
progress.txt, and ended.json with its exit code. `python -m reparam_diffusion.jobs.workshop FOLDER` does the work.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reparam_diffusion.errors import UserError
from reparam_diffusion.files import new_folder, require_writable, sweep_workspace, write_whole
from reparam_diffusion.jobs import locks, worker

MODULE = "reparam_diffusion.jobs.workshop"
COMMANDS = ("blend", "convert", "resize", "export", "doctor", "compare", "bake", "extract")
LOOK_AGAIN = 0.2  # seconds between two looks for a cancel
_STEP = re.compile(r"^(\d+) of (\d+)$")


@dataclass(frozen=True)
class Work:
    """Where a work stands. `said` is what the command printed, or the sentence that says why it did not end well."""

    state: Literal["running", "finished", "failed", "cancelled", "lost"]
    command: str
    done: int = 0
    total: int = 0
    said: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it still works."""
        return self.state == "running"


def submit(workspace: Path, arguments: Sequence[str], *, now: datetime.datetime) -> Path:
    """Start a command of the command line on adapter files; gives the folder that tells how it goes."""
    if not arguments or arguments[0] not in COMMANDS:
        raise UserError(f"{arguments[0] if arguments else 'Nothing'} is no work for the workshop.")
    require_writable(workspace / "workshop")
    sweep_workspace(workspace)
    folder = new_folder(workspace.resolve() / "workshop", f"{now:%Y%m%d-%H%M%S}-{arguments[0]}")
    write_whole(folder / "request.json", json.dumps(list(arguments)))
    with (folder / "log.txt").open("ab") as log:
        process = worker.start_detached([sys.executable, "-m", MODULE, str(folder)], log)
    write_whole(folder / "started.json", json.dumps({"pid": process.pid, "time": time.time()}))
    return folder


def cancel(folder: Path) -> None:
    """Ask a work to end early; what it had begun to write is taken away by itself."""
    (folder / "cancel").touch()


def state_of(folder: Path) -> Work:
    """Where a work stands now."""
    arguments = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    command = str(arguments[0])
    is_held = locks.is_held(folder / "lock")  # asked before its end is looked for
    ended = _json(folder / "ended.json")
    if ended is None:
        done, total = _progress(folder / "progress.txt")
        state: Literal["running", "lost"] = "running" if is_held or _is_starting(folder) else "lost"
        said = "" if state == "running" else "The work ended without a word. Start it again."
        return Work(state, command, done, total, said)
    if ended["code"] == 0:
        return Work("finished", command, said=_text(folder / "said.txt"))
    if (folder / "cancel").exists():
        return Work("cancelled", command, said="Cancelled.")
    return Work("failed", command, said=_trouble(folder))


def _is_starting(folder: Path) -> bool:
    """Whether the process was launched moments ago and has not got as far as its lock."""
    started = _json(folder / "started.json")
    return started is None or (time.time() - started["time"] < 20 and not (folder / "lock").exists())


def _progress(file: Path) -> tuple[int, int]:
    for line in reversed(_text(file).splitlines()[-20:]):
        if found := _STEP.match(line.strip()):
            return int(found[1]), int(found[2])
    return 0, 0


def _trouble(folder: Path) -> str:
    lines = _text(folder / "progress.txt").splitlines()
    told = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return told[-1] if told else f"This is our mistake. Please send us {folder / 'progress.txt'}."


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json(file: Path) -> dict[str, float] | None:
    try:
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, heed a cancel, and write down how it ended."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    folder = Path(name)
    command = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    with locks.try_hold(folder / "lock", patience=1.0) as held:
        if not held:
            return 0
        with (folder / "said.txt").open("wb") as said, (folder / "progress.txt").open("wb") as progress:
            environment = dict(os.environ, PYTHONIOENCODING="utf-8")
            child = subprocess.Popen(
                [sys.executable, "-m", "reparam_diffusion", *command], stdout=said, stderr=progress, env=environment
            )
            with worker.heeded_signals() as signalled:
                while child.poll() is None:
                    if (folder / "cancel").exists() or signalled():
                        child.terminate()
                    time.sleep(LOOK_AGAIN)
        write_whole(folder / "ended.json", json.dumps({"code": child.returncode}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
