from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from msf_faiss.config import ParquetData
from msf_faiss.data.sources.disk_cache import cache_folder, cached_arrow, files_identity, open_arrow
from msf_faiss.errors import UserError


def write(target: Path) -> None:
    with pa.ipc.new_file(str(target), pa.schema({"x": pa.int64()})) as writer:
        writer.write_table(pa.table({"x": [1, 2]}))


def derive(shard: Path, variant: str = "a", write: Callable[[Path], None] = write) -> Path:
    return cached_arrow(shard, variant, shard.parent / "cache", write, verb="unpack", size=lambda: 3_000_000)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"original")
    return path


def test_a_file_is_written_once_per_shard_state_and_variant(shard: Path) -> None:
    first = derive(shard)
    written = first.stat().st_mtime_ns
    assert derive(shard) == first
    assert first.stat().st_mtime_ns == written
    files = {first, derive(shard, "b")}
    os.utime(shard, ns=(1, 1))
    files.add(derive(shard))
    shard.write_bytes(b"changed")
    files.add(derive(shard))
    assert len(files) == 4
    assert open_arrow(sorted(files))["x"].to_pylist() == [1, 2] * 4


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0 and no more", os.urandom(3000), None])
def test_a_damaged_file_is_written_again(shard: Path, damage: bytes | None) -> None:
    file = derive(shard)
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    assert open_arrow([derive(shard)])["x"].to_pylist() == [1, 2]


def test_concurrent_processes_do_no_harm(shard: Path) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(derive(shard))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert set(results) == set((shard.parent / "cache").iterdir())


def test_a_process_killed_while_writing_leaves_nothing_that_looks_valid(shard: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from msf_faiss.data.sources.disk_cache import cached_arrow\n"
        "def write(target): target.write_bytes(b'ARROW1'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "shard = Path(sys.argv[1]); cached_arrow(shard, 'a', shard.parent / 'cache', write, verb='unpack')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(shard)], check=False).returncode == -9
    assert [file.suffix for file in (shard.parent / "cache").iterdir()] == [".tmp"]
    assert open_arrow([derive(shard)])["x"].to_pylist() == [1, 2]


def test_a_full_disk_is_explained_and_leaves_nothing_behind(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(target: Path) -> None:
        target.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    explained = r"cannot unpack .*x\.parquet into .*cache: No space left on device; it needs 3 MB: .*data\.cache_dir"
    with pytest.raises(UserError, match=explained):
        derive(shard, write=fill)
    usage = shutil.disk_usage(shard)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match=explained):
        derive(shard)
    assert list((shard.parent / "cache").iterdir()) == []


def test_a_cache_that_is_not_a_folder_is_explained(shard: Path) -> None:
    (shard.parent / "cache").touch()
    with pytest.raises(UserError, match=r"cannot unpack .* into .*cache: .*data\.cache_dir"):
        derive(shard)


def test_cache_folder_defaults_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(ParquetData(path=Path("x"))) == Path("/xdg/msf-faiss")
    assert cache_folder(ParquetData(path=Path("x"), cache_dir=Path("own"))) == Path("own")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_folder(ParquetData(path=Path("x"))) == Path("/home/ada/.cache/msf-faiss")


def test_files_identity(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("1")
    identities = [files_identity(files), files_identity(files, "more"), files_identity(files[::-1])]
    files[1].write_text("1")
    identities.append(files_identity(files))
    os.utime(files[1], ns=(1, 1))
    identities.append(files_identity(files))
    assert files_identity(files) == identities[-1]
    assert len(set(identities)) == 5
