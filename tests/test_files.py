"""Files replaced in one step: what is there afterwards, and what is there if writing fails."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lightning_bln._files import replacing


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_old_content_is_there_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_failure_leaves_all_as_it_was(tmp_path: Path, error: type[BaseException], existed: bool) -> None:
    path = tmp_path / "state.pt"
    if existed:
        path.write_bytes(b"old")
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_folders_are_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "run" / "seed0" / "result.json") as file:
        file.write(b"{}")
    assert (tmp_path / "run" / "seed0" / "result.json").read_text() == "{}"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "best.ckpt", tmp_path / "last.ckpt"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")
    path.chmod(mode)
    with replacing(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", mode)


def test_permissions_of_another_file(tmp_path: Path) -> None:
    model, path = tmp_path / "model.ckpt", tmp_path / "copy.ckpt"
    model.touch()
    model.chmod(0o640)
    with replacing(path, like=model) as file:
        file.write(b"new")
    assert mode_of(path) == 0o640


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    with replacing(tmp_path / "new") as file:
        file.write(b"new")
    assert mode_of(tmp_path / "new") == mode_of(usual)
