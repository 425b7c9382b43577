"""`data.cache`: decode a small data set once and keep its pixels in memory, shared with the worker processes.

The pixels are in a nameless file (memfd). Workers get its descriptor and map the same pages; /dev/shm, small in a
container, does not limit it; and it disappears with the last process. Each rank has its own.

Shapes: N images, H, W pixels of an image.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import Config, SourceConfig
from msf_faiss.data.readable import add_unreadable, decode_readable
from msf_faiss.data.source import Reduce, Source, UnreadableImageError
from msf_faiss.data.workers import load, worker_count

_SAMPLE = 64  # images by whose size that of all is estimated
_AUTO_SHARE = 1 / 8  # of the free memory, at most, for `cache: auto`
_CHUNK = 128  # images that a worker decodes at a time


def cache_size(source: Source, config: Config, *, processes: int = 1) -> int | None:
    """Estimated bytes of the decoded images to cache; 0: all may be reduced; None: `data.cache` says not to cache.

    `processes`: number of processes of this host that cache as much each, and share its free memory.

    Raises:
        UserError: with `unreadable: error`, if an image of the sample is unreadable.
    """
    rule = config.data.cache
    if rule == "none" or source.in_memory:
        return None
    needed = _estimate(source, config.data, config.views.size)
    if rule == "memory":
        return needed
    free = _free_memory()
    return needed if needed and free is not None and needed <= _AUTO_SHARE * free / processes else None


def cache_decoded(source: Source, config: Config, *, processes: int = 1) -> DecodedCache:
    """Decode the images of `source` into memory. `processes`: as many of this host do so and share its cores.

    Raises:
        UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are.
    """
    workers = min(worker_count(source, config, processes=processes), len(source) // _CHUNK)
    decode = partial(_decode_chunk, source, config.data, config.views.size)
    chunks = [np.arange(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    unreadable: dict[int, str] = {}
    shapes = []
    with _nameless_file() as file:
        for chunk in load(decode, chunks, workers=workers):
            add_unreadable(unreadable, chunk.unreadable, config.data)
            shapes.append(chunk.shapes)
            file.write(chunk.pixels.numpy().data)
        file.flush()
        return DecodedCache(source, os.dup(file.fileno()), np.concatenate(shapes), unreadable)


class DecodedCache:
    """A `Source` of decoded images.

    Images that may be reduced are not cached, but decoded by the original source each time: the views are bit for bit
    those without a cache.
    """

    in_memory = True

    def __init__(self, source: Source, descriptor: int, shapes: NDArray[np.int64], unreadable: dict[int, str]) -> None:
        """`descriptor`: of a file with the pixels [H, W, 3] of one image after another, closed with this object;
        `shapes`: [N, 2] H, W, zeros for images that are not cached; `unreadable`: problems by id."""
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
    def bytes(self) -> int:
        """Memory of the cached images."""
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

    def relative_names(self) -> Iterable[str]:
        return self._source.relative_names()

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        if index in self._unreadable:
            raise UnreadableImageError(self._unreadable[index])
        height, width = self._shapes[index]
        if not height:
            return self._source.decode(index, reduce)
        end = self._ends[index]
        pixels = self._pixels[end - 3 * height * width : end]
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1)


class _Chunk(NamedTuple):
    shapes: NDArray[np.int64]  # [n, 2]
    pixels: Tensor  # uint8 [bytes] of one image after another
    unreadable: dict[int, str]


def _decode_chunk(source: Source, config: SourceConfig, size: int, ids: NDArray[np.int64]) -> _Chunk:
    readable, images, unreadable = decode_readable(source, ids, config)
    shapes, pixels = np.zeros((len(ids), 2), np.int64), [torch.empty(0, dtype=torch.uint8)]
    for index, image in zip(readable - ids[0], images, strict=True):
        if not _may_be_reduced(image.shape, size):
            shapes[index] = image.shape[1:]
            pixels.append(image.permute(1, 2, 0).reshape(-1))
    return _Chunk(shapes, torch.cat(pixels), unreadable)


def _may_be_reduced(shape: Sequence[int], size: int) -> bool:
    return min(shape[1:]) >= 2 * size


def _nameless_file() -> IO[bytes]:
    """In memory on Linux; elsewhere on disk, where the page cache keeps it in memory while there is room."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("msf-faiss"), "w+b")
    return tempfile.TemporaryFile()


def _estimate(source: Source, config: SourceConfig, size: int) -> int:
    """Bytes of the images to cache, estimated from a sample; 0 if fewer than half of it would be cached."""
    ids = np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(np.int64)
    shapes = [image.shape for image in decode_readable(source, ids, config).images]
    sizes = [shape.numel() for shape in shapes if not _may_be_reduced(shape, size)]
    return round(len(source) * float(np.mean(sizes))) if 2 * len(sizes) >= len(ids) else 0


def _free_memory() -> int | None:
    """Bytes that this process can still allocate without swapping; None if unknown."""
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
