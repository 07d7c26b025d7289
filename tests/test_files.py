"""Places that cannot be written are found before any work, and nothing half-written is ever left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reparam_diffusion import files
from reparam_diffusion.errors import UserError


@pytest.mark.parametrize("name", ["new.txt", "some/new/folder", "."])
def test_a_place_that_can_be_written_passes_and_stays_as_it_was(name: str, tmp_path: Path) -> None:
    files.require_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/new.txt", "file/deep/new", "link/new"])
def test_a_file_in_the_way_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="is a file, not a folder"):
        files.require_writable(tmp_path / name)


@pytest.mark.parametrize(
    ("code", "why"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "rights"), (errno.ENOSPC, "full"), (errno.EIO, "cannot be written")],
)
def test_a_disk_that_refuses_is_a_sentence(
    code: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=why):
        files.require_writable(tmp_path / "new" / "file")


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_a_name_that_no_disk_takes_is_a_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        files.require_writable(tmp_path / name)


def test_a_long_name_leaves_room_for_the_hidden_one(tmp_path: Path) -> None:
    for name in ("x" * 250, "ä" * 125):
        assert files.write_whole(tmp_path / name, "a").read_text() == "a"


def test_an_input_is_not_replaced_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.safetensors"
    source.write_text("")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("a.safetensors", "soft", "hard", "sub/../a.safetensors", str(source)):
        with pytest.raises(UserError, match="would replace the input"):
            files.require_new_file(Path(out), sources=[source])
    (tmp_path / "other").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for out in ("other", "sub", "dangling"):
        with pytest.raises(UserError, match="exists already"):
            files.require_new_file(tmp_path / out, sources=[source])
    files.require_new_file(tmp_path / "new", sources=[source])


def test_a_failure_to_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "put_on_disk", full)
    with pytest.raises(UserError, match="disk is full"):
        files.write_whole(tmp_path / "a", "a")
    assert list(tmp_path.iterdir()) == []


def test_only_the_parts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = files.hidden_part(tmp_path / "a")
    alive = Path(str(mine).replace(f".{os.getpid()}-", f".{os.getppid()}-"))
    left = Path(str(mine).replace(f".{os.getpid()}-", f".{dead.pid}-"))
    left_folder = Path(str(left).replace(".a.", ".b."))
    elsewhere = tmp_path / f".a.00000000.{dead.pid}-1.part"
    old, older_form = tmp_path / f".b.00000000.{dead.pid}-1.part", tmp_path / f".b.{dead.pid}-1.part"
    others = [tmp_path / name for name in (".part", "a.part", ".hidden.part", f"a.{dead.pid}-1.part")]
    for file in (mine, alive, left, elsewhere, old, older_form, *others):
        file.write_text("")
    left_folder.mkdir()
    (left_folder / "inner").write_text("")
    for file in (old, older_form):
        os.utime(file, (time.time() - 2 * 86400,) * 2)
    assert set(files.sweep_leftovers(tmp_path)) == {left, left_folder, old, older_form}
    assert set(tmp_path.iterdir()) == {mine, alive, elsewhere, *others}


def test_the_next_one_that_writes_there_sweeps(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from reparam_diffusion.files import beside\n"
        "with beside(pathlib.Path(sys.argv[1])) as hidden:\n    hidden.write_text('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    files.write_whole(tmp_path / "b", "b")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]
