from __future__ import annotations

import pickle

import pytest
import torch

from msf_faiss.data.source import Source
from msf_faiss.data.sources.memory import MemorySource

BLANK = torch.zeros(4, 3, 8, 9, dtype=torch.uint8)


def test_memory_source() -> None:
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 9)
    source = MemorySource(images, [0, 1, -1, 1], ["a", "b"], title="blank")
    assert isinstance(source, Source)
    assert len(source) == 4
    assert source.in_memory
    assert source.name(2) == "blank[2]"
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [int(image[0, 0, 0]) for image in map(copy.decode, [3, 0, 3])] == [3, 0, 3]
        assert copy.labels.tolist() == [0, 1, -1, 1]
        assert copy.classes == ("a", "b")


@pytest.mark.parametrize(
    ("images", "labels", "classes", "complaint"),
    [
        (BLANK.float(), None, None, r"must be uint8 \[N, 3, H, W\], found torch\.float32"),
        (BLANK[0], None, None, r"must be uint8 \[N, 3, H, W\]"),
        (BLANK, [0] * 4, None, "must be given together"),
        (BLANK, [0] * 3, ["a"], r"labels must be \[4\], one per image, found \[3\]"),
    ],
)
def test_invalid_arguments_are_refused(images: torch.Tensor, labels: object, classes: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MemorySource(images, labels, classes, title="x")  # type: ignore[arg-type]


def test_identity_depends_on_the_pixels_only() -> None:
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    one = images.clone()
    one[3, 2, 1, 1] = 1
    known = MemorySource(images, title="a").identity()
    assert MemorySource(images.clone(), title="b").identity() == known
    assert MemorySource(one, title="a").identity() != known
    assert MemorySource(images.view(2, 3, 4, 2), title="a").identity() != known
