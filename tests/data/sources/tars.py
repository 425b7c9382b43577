"""Small WebDataset shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msf_faiss.config import WebDatasetData
from msf_faiss.data.sources.webdataset import WebDatasetSource


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), gray, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, *members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str | int, gray: int, label: int | None = None) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(gray)), *([] if label is None else [(f"{key}.cls", b"%d\n" % label)])]


def shard(path: Path, grays: range, classes: int = 2) -> Path:
    return write(path, *(member for gray in grays for member in sample(gray, gray, gray % classes)))


def source(path: Path, root: Path | None = None, **settings: Any) -> WebDatasetSource:
    cache = (root or path.parent) / "cache"
    return WebDatasetSource(WebDatasetData(path=path, **{"cache_dir": cache} | settings), path)


def grays(opened: WebDatasetSource, ids: Any = None) -> list[int]:
    return [int(image[0, 0, 0]) for image in map(opened.decode, range(len(opened)) if ids is None else ids)]
