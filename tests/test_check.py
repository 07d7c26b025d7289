"""Settings that cannot be are told before a run is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import NOW

from reparam_diffusion.config import parse_set, settle
from reparam_diffusion.errors import UserError
from reparam_diffusion.jobs import runs


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (["embedding.vectors=2"], "data.trigger"),
        (["embedding.vectors=2", "data.trigger=a.b"], "data.trigger"),
        (["model.block_offload=true", "training.compile=true"], "training.compile"),
    ],
)
def test_what_cannot_be_is_told_before_a_run_is_made(settings: list[str], place: str, workspace: Path) -> None:
    with pytest.raises(UserError) as told:
        runs.create_run(settle(parse_set(settings)), workspace, now=NOW)
    assert told.value.place == place
    assert runs.list_runs(workspace) == []
