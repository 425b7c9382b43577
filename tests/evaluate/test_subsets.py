import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.errors import UserError
from msf_faiss.evaluate.subsets import Subset, balanced_subset, listed_subset


class Named:
    """Images with names and labels only."""

    in_memory = False

    def __init__(self, names: list[str], labels: Sequence[int] | None = None) -> None:
        self.names, self.calls = names, 0
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.classes = None if labels is None else tuple(map(str, range(max(labels) + 1)))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        self.calls += 1
        return self.names[index]

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        raise NotImplementedError


def labelled(labels: Sequence[int]) -> Named:
    return Named([f"/images/{index}.jpg" for index in range(len(labels))], labels)


def slow_balanced(labels: list[int], fraction: float) -> dict[int, int]:
    """Number of images of each class."""
    by_class = {label: labels.count(label) for label in sorted(set(labels)) if label >= 0}
    per_class = max(1, round(fraction * sum(by_class.values()) / len(by_class)))
    return {label: min(per_class, count) for label, count in by_class.items()}


def counts(source: Named, subset: Subset) -> dict[int, int]:
    assert source.labels is not None
    labels, numbers = np.unique(source.labels[subset.ids.numpy()], return_counts=True)
    return dict(zip(labels.tolist(), numbers.tolist(), strict=True))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.37, 1.0])
@pytest.mark.parametrize(
    "sizes", [{0: 500, 1: 500, 2: 500}, {0: 900, 3: 90, 7: 9, -1: 50}, {0: 1, 1: 1}, {2: 5}], ids=str
)
def test_balanced_subset_has_equal_classes(sizes: dict[int, int], fraction: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values()))).tolist()
    source = labelled(labels)
    subset = balanced_subset(source, fraction, seed=1)
    expected = slow_balanced(labels, fraction)
    assert counts(source, subset) == expected
    assert subset.ids.dtype == torch.int64
    assert subset.ids.tolist() == sorted(set(subset.ids.tolist()))
    assert subset.description == {
        "fraction": fraction,
        "seed": 1,
        "images": sum(expected.values()),
        "classes": len(expected),
        "images_per_class": {"least": min(expected.values()), "most": max(expected.values())},
    }


def test_smaller_subset_is_part_of_a_larger_one() -> None:
    source = labelled(np.random.default_rng(0).integers(7, size=3000).tolist())
    before: set[int] = set()
    for fraction in (0.01, 0.1, 0.5, 1.0):
        ids = set(balanced_subset(source, fraction, seed=4).ids.tolist())
        assert before < ids
        before = ids
    assert not set(balanced_subset(source, 0.01, seed=5).ids.tolist()) < set(
        balanced_subset(source, 0.1, seed=4).ids.tolist()
    )


def test_balanced_subset_never_changes() -> None:
    """The same on every machine and in every release."""
    assert balanced_subset(labelled([0, 1, 2, 3] * 100), 0.02, seed=0).ids.tolist() == [
        5,
        116,
        136,
        142,
        174,
        245,
        343,
        395,
    ]
    # The choice does not depend on the images of other classes.
    few = balanced_subset(labelled(([0, 1, 2, 3] * 100)[:-1]), 0.02, seed=0)
    assert few.ids.tolist() == [5, 116, 136, 142, 174, 245, 343, 395]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_invalid_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match=r"must be above 0 and at most 1.*0\.01 means 1 %"):
        balanced_subset(labelled([0, 1]), fraction, seed=0)


def test_unlabelled_images_have_no_subsets(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("0\n")
    for source in (Named(["a.jpg"]), Named(["a.jpg", "b.jpg"], [-1, -1])):
        with pytest.raises(UserError, match="have no labels"):
            balanced_subset(source, 0.1, seed=0)
        with pytest.raises(UserError, match="have no labels"):
            listed_subset(source, tmp_path / "list.txt")


NAMES = [
    "/data/train/n01/n01_1.JPEG",
    "/data/train/n01/n01_2.JPEG",
    "/data/train/n02/n02_1.JPEG",
    "/data/train/n02/same.JPEG",
    "/data/train/n01/same.JPEG",
    "/data/train/n02/not_same.JPEG",
    "/data/train/none/x.JPEG",
]
LABELS = [0, 0, 1, 1, 0, 1, -1]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("n02_1.JPEG\nn01_1.JPEG\n", [0, 2]),
        ("n02_1.JPEG\r\nn01_1.JPEG", [0, 2]),
        ("\ufeffn02_1.JPEG\n\n  # all of n02\n \t \nn01_1.JPEG  \n", [0, 2]),
        ("n02/same.JPEG\nn01_2.JPEG\ntrain/n01/same.JPEG", [1, 3, 4]),
        ("./n02/same.JPEG\n/data/train/n01/same.JPEG", [3, 4]),
        ("not_same.JPEG", [5]),  # not same.JPEG, which has the same ending
        ("5\n0\n+3\n", [0, 3, 5]),
    ],
)
def test_list_of_names_or_ids(tmp_path: Path, text: str, ids: list[int]) -> None:
    subset = listed_subset(Named(NAMES, LABELS), write(tmp_path, text))
    assert subset.ids.tolist() == ids
    assert subset.ids.dtype == torch.int64
    per_class = np.bincount(np.array(LABELS)[ids], minlength=2)
    assert subset.description == {
        "file": "list.txt",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "images": len(ids),
        "classes": 2,
        "images_per_class": {"least": per_class.min(), "most": per_class.max()},
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "n01_1.JPEG\n# no\nn01_3.JPEG\n",
            "line 3: no image name ends in 'n01_3.JPEG' .they look like /data/train/n01/n01_1",
        ),
        ("ame.JPEG\n", "line 1: no image name ends in 'ame.JPEG'"),
        ("n03/same.JPEG\n", "line 1: no image name ends in 'n03/same.JPEG'"),
        ("x/data/train/n01/n01_1.JPEG\n", "line 1: no image name ends in"),
        ("n01/\n", "line 1: no image name ends in"),
        ("n01_1.JPEG\n2\n", "line 2: no image name ends in '2'"),
        (
            "n01_1.JPEG\nsame.JPEG\n",
            "line 2: 'same.JPEG' matches /data/train/n02/same.JPEG and /data/train/n01/same.JPEG; write more of",
        ),
        ("n01_1.JPEG\n\nn01/n01_1.JPEG\n", "line 3: 'n01/n01_1.JPEG' is the same image as line 1; remove one of them"),
        ("n01_1.JPEG\nn01_1.JPEG\n", "line 2: 'n01_1.JPEG' is the same image as line 1"),
        ("4\n04\n", "line 2: '04' is the same image as line 1"),
        ("0\nx.JPEG\n".replace("0", "n01_1.JPEG"), "line 2: /data/train/none/x.JPEG has no label"),
        ("0\n6\n", "line 2: /data/train/none/x.JPEG has no label"),
        ("0\n7\n", "line 2: there is no image '7'; ids are 0 to 6"),
        ("-1\n", "line 1: there is no image '-1'"),
        ("9" * 5000, r"line 1: there is no image '9{97}\.\.\.'"),
        ("", "the list is empty"),
        ("# nothing\n\n  \n", "the list is empty"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a text file"),
        ("n01_1.JPEG\n".encode("utf-16"), "not a text file"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"list\.txt(:|,) {complaint}"):
        listed_subset(Named(NAMES, LABELS), write(tmp_path, text))


def test_unreadable_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: cannot read the list of images: No such file"):
        listed_subset(Named(NAMES, LABELS), tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot read the list of images: Is a directory"):
        listed_subset(Named(NAMES, LABELS), tmp_path)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("/data/train-0.parquet, row 12 (n01/a (1).JPEG)", "a (1).JPEG"),
        ("/data/train-0.parquet, row 12 (a.JPEG)", "a.JPEG"),
        ("hub/set (train), row 12 (n01/a.JPEG)", "n01/a.JPEG"),
        ("/data/train-0000.tar, a.jpg", "a.jpg"),
        ("/data/train-0000.tar, n01/a.jpg", "n01/a.jpg"),
        ("cifar[12]", "cifar[12]"),
        ("/data/odd, name (2).jpg", "odd, name (2).jpg"),
    ],
)
def test_list_matches_paths_within_tables_and_shards(tmp_path: Path, name: str, entry: str) -> None:
    source = Named(["/data/other.JPEG", name], [0, 0])
    assert listed_subset(source, write(tmp_path, entry)).ids.tolist() == [1]


def test_list_matches_hostile_names(tmp_path: Path) -> None:
    names = ["a b.jpg", "ünï.jpg", "#1.jpg", "<b>.jpg", os.fsdecode(b"latin-\xe9.jpg"), "a\u2028b.jpg", "a\x0bb.jpg"]
    for folder in ("one", "two"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "data" / folder / name).touch()
    source = FolderSource(tmp_path / "data")
    lines = [os.fsencode(f"two/{name}") for name in names]
    subset = listed_subset(source, write(tmp_path, b"\n".join(lines)))
    assert subset.ids.tolist() == list(range(len(names), 2 * len(names)))
    assert subset.description["images_per_class"] == {"least": 0, "most": len(names)}


def test_long_list_reads_each_name_once(tmp_path: Path) -> None:
    """Even if all files have the same name and only their folders differ."""
    count = 3000
    source = Named([f"/data/{index}/image.jpg" for index in range(count)], [0, 1] * (count // 2))
    text = "\n".join(f"{index}/image.jpg" for index in range(0, count, 2))
    assert listed_subset(source, write(tmp_path, text)).ids.tolist() == list(range(0, count, 2))
    assert source.calls == count


def test_list_of_images_in_memory(tmp_path: Path) -> None:
    source = MemorySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 0, 1], ("a", "b"), title="drawn")
    assert listed_subset(source, write(tmp_path, "3\n0\n")).ids.tolist() == [0, 3]
    assert listed_subset(source, write(tmp_path, "drawn[2]\n")).ids.tolist() == [2]
