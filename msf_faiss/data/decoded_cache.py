"""The decoded images of a small data set, held in memory once for all processes that make views of them.

The memory is a file without a name (memfd): worker processes get its descriptor and map the same pages, a container's
small /dev/shm does not limit it, and it is gone when the last process is. Every rank holds its own.

Shapes: N images, H × W pixels of an image.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import Config, SourceConfig
from msf_faiss.data.source import Reduce, Source, UnreadableImageError
from msf_faiss.data.train_batches import decode_readable, note_unreadable, worker_count
from msf_faiss.data.workers import load

__all__ = ["DecodedCache", "cache_decoded", "cache_size"]

_SAMPLE = 64  # images that tell how large all are
_SHARE = 1 / 8  # of the memory that is free, that `auto` may take
_CHUNK = 128  # images decoded at a time


def cache_size(source: Source, config: Config, *, processes: int = 1) -> int | None:
    """About how many bytes `cache_decoded` is to take by `data.cache`; None if it is to leave the source as it is.

    `processes`: on this host that do the same, and share its free memory.

    Raises:
        UserError: if an image of the sample is unreadable and may not be.
    """
    rule = config.data.cache
    if rule == "none" or source.in_memory:
        return None
    needed = _estimate(source, config.data, config.views.size)
    if rule == "memory":
        return needed
    free = _free_memory()
    return needed if needed and free is not None and needed <= _SHARE * free / processes else None


def cache_decoded(source: Source, config: Config, *, processes: int = 1) -> DecodedCache:
    """`source`, with its decoded images in memory. `processes`: on this host that do the same, and share its cores.

    Raises:
        UserError: if an image is unreadable and may not be, or more are than may be.
    """
    workers = min(worker_count(source, config, processes=processes), len(source) // _CHUNK)
    return _decode_all(source, config.data, config.views.size, workers)


class DecodedCache:
    """A `Source` whose images were decoded before. Those that may be decoded smaller (see `Reduce`) are left to the
    source that they come from, so that views are the same bits as without this."""

    in_memory = True

    def __init__(self, source: Source, descriptor: int, shapes: NDArray[np.int64], unreadable: dict[int, str]) -> None:
        """`descriptor`: of a file with the pixels, image after image, which becomes this object's own; `shapes` [N, 2]:
        H, W, zeros for an image that is not there; `unreadable`: by id, what is wrong with an image."""
        self._source, self._shapes, self._unreadable = source, shapes, unreadable
        self._ends = 3 * shapes.prod(1).cumsum()  # [N]
        self.labels, self.classes = source.labels, source.classes
        self._open(descriptor)

    def _open(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        mapped = mmap.mmap(descriptor, self.bytes) if self.bytes else b""
        self._pixels: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)

    @property
    def images(self) -> int:
        """How many are held."""
        return int((self._shapes[:, 0] > 0).sum())

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": DupFd(self._descriptor), "_pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(state["_descriptor"].detach())

    def name(self, index: int) -> str:
        return self._source.name(index)

    def identity(self) -> str:
        return self._source.identity()

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        return [self._decode(int(index), reduce) for index in ids]

    def _decode(self, index: int, reduce: Reduce | None) -> Tensor:
        if index in self._unreadable:
            raise UnreadableImageError(self._unreadable[index])
        height, width = self._shapes[index]
        if not height:
            return self._source.decode([index], reduce)[0]
        end = self._ends[index]
        pixels = self._pixels[end - 3 * height * width : end]
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1)


class _Chunk(NamedTuple):
    shapes: NDArray[np.int64]  # [n, 2]
    pixels: Tensor  # uint8, of one image after the other
    unreadable: dict[int, str]


class _Decoder:
    """Decodes some images; pickled into the workers."""

    def __init__(self, source: Source, config: SourceConfig, size: int) -> None:
        self._source, self._config, self._size = source, config, size

    def __call__(self, ids: NDArray[np.int64]) -> _Chunk:
        readable, images, unreadable = decode_readable(self._source, ids, self._config)
        shapes, pixels = np.zeros((len(ids), 2), np.int64), [torch.empty(0, dtype=torch.uint8)]
        for index, image in zip(readable - ids[0], images, strict=True):
            if min(image.shape[1:]) < 2 * self._size:  # else it may be decoded smaller
                shapes[index] = image.shape[1:]
                pixels.append(image.permute(1, 2, 0).reshape(-1))
        return _Chunk(shapes, torch.cat(pixels), unreadable)


def _decode_all(source: Source, config: SourceConfig, size: int, workers: int) -> DecodedCache:
    unreadable: dict[int, str] = {}
    shapes = []
    chunks = [np.arange(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    with _nameless_file() as file:
        for chunk in load(_Decoder(source, config, size), chunks, workers=workers):
            note_unreadable(unreadable, chunk.unreadable, config)
            shapes.append(chunk.shapes)
            file.write(chunk.pixels.numpy().data)
        file.flush()
        return DecodedCache(source, os.dup(file.fileno()), np.concatenate(shapes), unreadable)


def _nameless_file() -> IO[bytes]:
    """In memory; elsewhere than on Linux on disk, where its pages stay in memory while there is room."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("msf-faiss"), "w+b")
    return tempfile.TemporaryFile()


def _estimate(source: Source, config: SourceConfig, size: int) -> int:
    """Bytes of the images to be held, by a sample of them; 0 if there are hardly any."""
    ids = np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(np.int64)
    found = [image.shape for image in decode_readable(source, ids, config).images if min(image.shape[1:]) < 2 * size]
    if 2 * len(found) < len(ids):
        return 0
    return round(len(source) * float(np.mean([channels * height * width for channels, height, width in found])))


def _free_memory() -> int | None:
    """Bytes that this process could still take without anything having to give way; None where that cannot be told."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        group = Path("/sys/fs/cgroup")
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            free = min(free, int(most) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        return None
    return free
