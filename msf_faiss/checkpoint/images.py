"""The names and labels of the training images in a checkpoint: ids count images, so they must stay the same images.

`data.safetensors`: `names`, uint8, the names (see `Source.relative_names`) joined by zero bytes and compressed by zlib;
`labels`, int64 [N], if the images are labelled.
"""

import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from msf_faiss.checkpoint.format import ENDING, Checkpoint, Tensors
from msf_faiss.data.source import Source
from msf_faiss.text import printable

FILE = "data"


class _ImageChanges(NamedTuple):
    """In words; None: nothing."""

    images: str | None  # other images, or the same in another order
    labels: str | None  # other labels of the same images


def describe_images(source: Source) -> Tensors:
    """The tensors of the file."""
    text = "\0".join(name.replace("\0", "") for name in source.relative_names())
    packed = zlib.compress(text.encode(errors="surrogateescape"), level=1)
    tensors = {"names": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}
    if source.labels is not None:
        tensors["labels"] = torch.from_numpy(source.labels)
    return tensors


def find_changes(checkpoint: Checkpoint, source: Source) -> _ImageChanges:
    """What differs between the images of a checkpoint and `source`. Before version 4 there is only their number.

    Raises:
        UserError: if the file is damaged.
    """
    sizes = None
    if len(source) != checkpoint.dataset_size:
        sizes = f"there were {checkpoint.dataset_size:,} training images, now there are {len(source):,}"
    if FILE + ENDING not in checkpoint.files:
        return _ImageChanges(sizes, None)
    saved = checkpoint.tensors(FILE)
    old = zlib.decompress(saved["names"].numpy().tobytes()).decode(errors="surrogateescape").split("\0")
    new = list(source.relative_names())
    if old != new or sizes is not None:
        gone, added = Counter(old) - Counter(new), Counter(new) - Counter(old)
        parts = [sizes] if sizes else []
        parts += [f"{_some(gone)} gone"] if gone else []
        parts += [f"{_some(added)} new"] if added else []
        if not parts:
            first = next(index for index, names in enumerate(zip(old, new, strict=True)) if names[0] != names[1])
            parts = [f"they have another order: image {first} was {printable(old[first])}, is {printable(new[first])}"]
        return _ImageChanges("; ".join(parts), None)
    before = saved["labels"].numpy() if "labels" in saved else np.full(len(new), -1)
    now = np.full(len(new), -1) if source.labels is None else source.labels
    different = np.flatnonzero(before != now)
    if not len(different):
        return _ImageChanges(None, None)
    first = int(different[0])
    return _ImageChanges(
        None,
        f"{len(different):,} of {len(new):,} labels have changed: that of {printable(new[first])} was {before[first]}, "
        f"is {now[first]}",
    )


def _some(names: Counter[str]) -> str:
    count = names.total()
    first = printable(next(iter(names)))
    return f"{first} is" if count == 1 else f"{count:,} images ({first}, …) are"
