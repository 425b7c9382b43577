"""Inspections of synthetic images with random labels, without a checkpoint."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from msf_faiss.neighbors.records import (
    Inspection,
    InspectionProtocol,
    NeighborRecord,
    OwnEntry,
    QueryRecord,
    Summary,
    Thumbnails,
)

MakeInspection = Callable[..., Inspection]


@pytest.fixture
def make_inspection() -> MakeInspection:
    return _inspection


def _inspection(
    *,
    queries: int = 3,
    k: int = 4,
    side: int = 32,
    classes: tuple[str, ...] | None = ("stripes", "dots", "rings"),
    name: str = "images/{}.png",
    searched: str = "bank",
    thumbnails: bool = True,
    requested: int | None = None,
) -> Inspection:
    """Query q has label q mod classes, and neighbours 100 q .. 100 q + k - 1 with random labels."""
    rng = np.random.default_rng(0)
    has_ages = searched == "bank"
    records = []
    for query in range(queries):
        label = None if classes is None else query % len(classes)
        labels = [None if classes is None else int(rng.integers(len(classes))) for _ in range(k)]
        neighbors = tuple(
            NeighborRecord(
                rank=rank + 1,
                id=100 * query + rank,
                name=name.format(100 * query + rank),
                similarity=0.98 - 0.013 * rank,
                age=int(rng.integers(4096)) if has_ages else None,
                label=theirs,
                class_name=None if classes is None or theirs is None else classes[theirs],
                matches=None if label is None else label == theirs,
            )
            for rank, theirs in enumerate(labels)
        )
        records.append(
            QueryRecord(
                id=100_000 + query,
                name=name.format(100_000 + query),
                label=label,
                class_name=None if classes is None or label is None else classes[label],
                own=OwnEntry(similarity=0.987, age=123 if has_ages else None, entries=1),
                neighbors=neighbors,
            )
        )
    protocol = InspectionProtocol(
        checkpoint="runs/first/checkpoints/step-00001234",
        run="runs/first",
        step=1234,
        epoch=39.81,
        searched="bank" if searched == "bank" else "dataset",
        entries=3000,
        capacity=4096 if has_ages else None,
        dtype="float32",
        encoder="target",
        view=f"shorter side {side} px, centre {side} px",
        k=requested or k,
        selection="random",
        seed=0,
        data={"kind": "demo"},
        dataset_size=4000,
        version="0.1.0",
    )

    def picture(index: int) -> Image.Image:
        gradient = np.linspace(0, 255, side, dtype=np.uint8)
        pixels = np.broadcast_to(gradient[:, None, None], (side, side, 3)).copy()
        pixels[..., index % 3] = gradient[None, :]
        return Image.fromarray(pixels)

    ids = [neighbor.id for query in records for neighbor in query.neighbors]
    pictures = Thumbnails(
        side=side, queries=tuple(map(picture, range(queries))), images={index: picture(index) for index in ids}
    )
    return Inspection(
        protocol=protocol,
        summary=Summary(
            images=2000,
            purity=None if classes is None else 0.13,
            purity_interval=None if classes is None else (0.12, 0.14),
            chance=None if classes is None else 1 / len(classes),
            purity_by_rank=(None if classes is None else 0.13,) * k,
            similarity=0.9,
            similarity_by_rank=(0.9,) * k,
            age=100.0 if has_ages else None,
        ),
        queries=tuple(records),
        thumbnails=pictures if thumbnails else None,
    )
