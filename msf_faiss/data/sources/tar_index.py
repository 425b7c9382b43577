"""Index the images of a tar file by reading its headers once, for random access.

The webdataset library streams shards and shuffles within a buffer; training here needs any image at any step. So the
library decides which files form a sample, and this index says where they are.
"""

import logging
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa

from msf_faiss.config import WebDatasetData
from msf_faiss.data.sources.disk_cache import cached_arrow
from msf_faiss.data.sources.labels import MOST_CLASSES
from msf_faiss.data.sources.listing import NO_CONTENT, readable_keys
from msf_faiss.data.sources.optional import import_optional
from msf_faiss.errors import UserError
from msf_faiss.text import printable

_SCHEMA = pa.schema({"name": pa.binary(), "offset": pa.int64(), "size": pa.int64(), "label": pa.int64()})
_META = re.compile(r"__[^/]*__($|/)")  # names reserved by the library
_LABEL_BYTES = 32  # read from a label file; a number is shorter
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}

_log = logging.getLogger(__name__)


def index_tar(shard: Path, config: WebDatasetData, cache: Path) -> Path:
    """Path of the Arrow file with a row per sample with an image, written first if necessary.

    Columns: name of the image file, offset and size of its contents in bytes, and label, -1 if unlabelled. Metadata of
    the schema: `left_out`, the number of samples without an image; `extensions`, those of their files; `dotted`, the
    number of files whose extension only ends like an image's, and `example`, the name of one; `bare`, the number of
    files without an extension.

    Raises:
        UserError: if the shard is compressed, damaged or not a tar file; if a sample has two files with the same
            extension or a label that is not a number; if the cache is not writable.
    """
    image_keys = readable_keys(map(_extension, config.image_keys))
    variant = f"tar index 2 {image_keys} {config.label_key}"
    return cached_arrow(shard, variant, cache, partial(_write, shard, config, image_keys), verb="index")


def _write(shard: Path, config: WebDatasetData, image_keys: Sequence[str], target: Path) -> None:
    names, numbers = [], array("q")
    counts = Counter({"left_out": 0, "dotted": 0, "bare": 0})
    example = ""
    extensions: set[str] = set()
    label_key = None if config.label_key is None else _extension(config.label_key)
    try:
        with tarfile.open(shard, "r:") as tar:
            for sample in _samples(tar, shard, counts):
                image = next((sample[key] for key in image_keys if key in sample), None)
                for key, member in sample.items():
                    # Beside an image, seg.png is a mask, but 0_0010.png the rest of a name.
                    if (
                        key.rpartition(".")[2] in image_keys
                        and key not in image_keys
                        and (not image or key[0].isdigit())
                    ):
                        counts["dotted"] += 1
                        example = example or member.name
                if image is None:
                    counts["left_out"] += 1
                    extensions |= sample.keys()
                    continue
                names.append(os.fsencode(image.name))
                label = sample.get(label_key) if label_key is not None else None
                numbers.extend([image.offset_data, image.size, -1 if label is None else _label(tar, label, shard)])
    except UserError:
        raise
    except Exception as error:  # tarfile raises many types for damaged headers
        raise _unusable(shard, error) from error
    offsets, sizes, labels = (pa.array(numbers[field::3], pa.int64()) for field in range(3))
    some = printable(" ".join(sorted(extensions)[:10]))
    counted = {key: str(count) for key, count in counts.items()}
    schema = _SCHEMA.with_metadata(counted | {"extensions": some, "example": printable(example)})
    with target.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_table(pa.table([pa.array(names, pa.binary()), offsets, sizes, labels], schema=schema))
        file.flush()
        os.fsync(file.fileno())


def _extension(key: str) -> str:
    return key.lower().removeprefix(".")


def _samples(tar: tarfile.TarFile, shard: Path, counts: Counter[str]) -> Iterator[dict[str, tarfile.TarInfo]]:
    """The files of each sample by lower-case extension, grouped as by the library; `counts["bare"]` are without one."""
    split_name = import_optional("webdataset.tariterators", "webdataset").base_plus_ext

    def named() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for member in _files(tar, shard):
            base, extension = split_name(member.name)
            if base is not None:
                yield base, extension, member
            elif not member.name.rpartition("/")[2].startswith("."):
                counts["bare"] += 1

    for _, group in groupby(named(), key=itemgetter(0)):
        sample: dict[str, tarfile.TarInfo] = {}
        for _, extension, member in group:
            if extension.lower() in sample:
                raise UserError(
                    f"{shard} contains two files of one sample with the same extension; the second is"
                    f" {printable(member.name)}; write the shard again with a name of its own for each sample"
                )
            sample[extension.lower()] = member
        yield sample


def _files(tar: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files in order.

    Raises:
        tarfile.TarError: if the tar file is damaged; `tarfile` takes a damaged header for the end.
    """
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or all of them stay in memory
        if member.issparse():
            raise tarfile.TarError(f"{printable(member.name)} is stored as a sparse file")
        if tar.offset <= member.offset:  # a negative size: tarfile would read this header again and again
            raise tarfile.TarError(f"the header at byte {member.offset} is damaged")
        if member.isreg() and not _META.match(member.name) and NO_CONTENT.isdisjoint(member.name.split("/")):
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) not in (0, tarfile.BLOCKSIZE) or any(end):
        raise tarfile.TarError(f"the header at byte {tar.offset} is damaged")
    if not end:
        _log.warning("%s has no end-of-archive marker; it may be truncated", shard)


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
            f"{shard}: {printable(member.name)} contains {text!r} instead of the number of a class (counted from 0;"
            " -1: unlabelled); set data.label_key to another extension, or to null to train without labels"
        )
    return label


def _unusable(shard: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
        return UserError(f"{shard} cannot be read: {error.strerror or error}")
    with shard.open("rb") as file:
        begin = file.read(8)
    for magic, command in _COMPRESSED.items():
        if begin.startswith(magic):
            return UserError(f"{shard} is compressed, which rules out random access; unpack it with {command}")
    return UserError(f"{shard} is not a complete tar file: {error}; download or write it again")
