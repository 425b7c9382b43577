"""Where the images of a tar file lie, so that they can be read in any order: its headers, read once.

The webdataset library reads shards from front to back, and shuffles what passes by in a buffer. Training here draws any
image at any step, by its id. So the library says what a sample is, and this index where.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from msf_faiss.config import WebDatasetData
from msf_faiss.data.sources.disk_cache import derive
from msf_faiss.data.sources.labels import MOST_CLASSES
from msf_faiss.data.sources.optional import library
from msf_faiss.errors import UserError
from msf_faiss.text import printable

_SCHEMA = pa.schema({"name": pa.binary(), "offset": pa.int64(), "size": pa.int64(), "label": pa.int64()})
_META = re.compile(r"__[^/]*__($|/)")  # names that the library reserves
_LABEL_BYTES = 32  # of a label's file that are looked at; a number has fewer
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}

_log = logging.getLogger(__name__)


class Image(NamedTuple):
    """A sample's image: the name of its file in the tar file, where its bytes are, and its class, or -1."""

    name: bytes
    offset: int
    size: int
    label: int


def index_tar(shard: Path, config: WebDatasetData, cache: Path) -> Path:
    """The Arrow file with the fields of `Image` as columns, a row for each sample with one; made if need be.

    The samples without an image are in its schema's metadata: `left_out`, their number, and `endings`, what they have.

    Raises:
        UserError: if the shard is compressed, damaged or no tar file, holds a file twice or a label that is no number,
            or the cache is not writable.
    """
    variant = f"tar index {config.image_keys} {config.label_key}"
    return derive(shard, variant, cache, partial(_write, shard, config), verb="index")


def _write(shard: Path, config: WebDatasetData, target: Path) -> None:
    names, numbers = [], array("q")
    left_out = 0
    endings: set[str] = set()
    image_keys = [_ending(key) for key in config.image_keys]
    label_key = None if config.label_key is None else _ending(config.label_key)
    try:
        with tarfile.open(shard, "r:") as tar:
            for sample in _samples(tar, shard):
                image = next((sample[key] for key in image_keys if key in sample), None)
                if image is None:
                    left_out += 1
                    endings |= sample.keys()
                    continue
                names.append(os.fsencode(image.name))
                label = sample.get(label_key) if label_key is not None else None
                numbers.extend([image.offset_data, image.size, -1 if label is None else _label(tar, label, shard)])
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _unusable(shard, error) from error
    offsets, sizes, labels = (pa.array(numbers[field::3], pa.int64()) for field in range(3))
    some = " ".join(sorted(endings)[:10])
    schema = _SCHEMA.with_metadata({"left_out": str(left_out), "endings": some.encode(errors="backslashreplace")})
    with target.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_table(pa.table([pa.array(names, pa.binary()), offsets, sizes, labels], schema=schema))
        file.flush()
        os.fsync(file.fileno())


def _ending(key: str) -> str:
    return key.lower().removeprefix(".")


def _samples(tar: tarfile.TarFile, shard: Path) -> Iterator[dict[str, tarfile.TarInfo]]:
    """The files of each sample by their endings, in lower case, as the library groups them."""
    split_name = library("webdataset.tariterators", "webdataset").base_plus_ext
    named = ((*split_name(member.name), member) for member in _files(tar, shard))
    for _, group in groupby((each for each in named if each[0] is not None), key=itemgetter(0)):
        sample: dict[str, tarfile.TarInfo] = {}
        for _, ending, member in group:
            if ending.lower() in sample:
                raise UserError(
                    f"{shard} holds two files of one sample with the same ending, the second is"
                    f" {printable(member.name)}; write the shard again with a name of its own for each sample"
                )
            sample[ending.lower()] = member
        yield sample


def _files(tar: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files, in order.

    Raises:
        tarfile.TarError: if the tar file is damaged; a damaged header in the middle looks like the end to `tarfile`.
    """
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else all of them stay in memory
        if member.issparse():
            raise tarfile.TarError(f"{printable(member.name)} is stored as a sparse file")
        if member.isreg() and not _META.match(member.name):
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) not in (0, tarfile.BLOCKSIZE) or any(end):
        raise tarfile.TarError(f"the header at byte {tar.offset} is damaged")
    if not end:
        _log.warning("%s ends without the mark of its end; more samples may have followed", shard)


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    assert tar.fileobj is not None
    tar.fileobj.seek(member.offset_data)
    text = tar.fileobj.read(min(member.size, _LABEL_BYTES))
    try:
        label = int(text)
    except ValueError:
        label = MOST_CLASSES
    if not -1 <= label < MOST_CLASSES:
        raise UserError(
            f"{shard}: {printable(member.name)} holds {text!r} rather than the number of a class (they count from 0;"
            " -1 is no label); set data.label_key to another ending, or to null to train without labels"
        )
    return label


def _unusable(shard: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
        return UserError(f"{shard} cannot be read: {error.strerror or error}")
    with shard.open("rb") as file:
        begin = file.read(8)
    for magic, command in _COMPRESSED.items():
        if begin.startswith(magic):
            return UserError(
                f"{shard} is compressed, so that no image can be had without all before it; unpack it with {command}"
            )
    return UserError(f"{shard} is not a complete tar file: {error}; fetch or write it again")
