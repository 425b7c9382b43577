import subprocess
import sys
from pathlib import Path

import pytest

from msf_faiss import files
from msf_faiss.files import atomic_paths, write_atomic


def test_write_atomic_creates_folders_and_replaces_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomic(path, "ä")
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [file.name for file in path.parent.iterdir()] == ["c.txt"]


def test_failed_write_atomic_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.txt"
    write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["c.txt"]


def test_killed_write_atomic_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_atomic(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from msf_faiss.files import write_atomic\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), 'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"
    write_atomic(path, "newer")
    assert path.read_text() == "newer"


def test_atomic_paths_renames_all_files_at_the_end(tmp_path: Path) -> None:
    one, two = tmp_path / "new" / "a.bin", tmp_path / "b.bin"
    two.write_text("old")
    with atomic_paths(one, two) as names:
        for name in names:
            name.write_text("new")
        assert not one.exists()
        assert two.read_text() == "old"
    assert (one.read_text(), two.read_text()) == ("new", "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "b.bin", "new"]


def test_failed_atomic_paths_leaves_the_old_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")

    def write() -> None:
        with atomic_paths(path, tmp_path / "b.bin") as names:
            for name in names:
                name.write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
