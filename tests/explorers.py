"""Contents of pages of neighbours, computed by brute force from a few random embeddings."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msf_faiss.neighbors.page_content import (
    ClassPurity,
    Cluster,
    Confusion,
    EmbeddingMap,
    Explorer,
    Graph,
    Histogram,
    Hub,
    Moment,
    Nodes,
    Statistics,
)
from msf_faiss.neighbors.records import InspectionProtocol, Summary


def drawn(count: int, side: int = 16) -> tuple[Image.Image, ...]:
    """Pictures that all differ."""
    gradient = np.linspace(0, 255, side, dtype=np.uint8)
    pictures = []
    for index in range(count):
        pixels = np.broadcast_to(gradient[:, None, None], (side, side, 3)).copy()
        pixels[..., index % 3] = gradient[None, :]
        pixels[: side // 2, : side // 2] = [index * 37 % 256, index * 91 % 256, index * 151 % 256]
        pictures.append(Image.fromarray(pixels))
    return tuple(pictures)


def make_explorer(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    pictures: Sequence[Image.Image] | None = None,
    classes: tuple[str, ...] | None = ("stripes", "dots", "rings"),
    names: Sequence[str] | None = None,
    queries: Sequence[int] | None = None,
    k: int = 5,
    aged: bool = True,
    order: str = "random",
    run: str | None = "runs/first",
    evolution: Sequence[NDArray[np.float32]] = (),
    clusters: int = 0,
    with_map: bool = False,
    incomplete: Sequence[int] = (),
    members: int = 12,
) -> Explorer:
    """Contents of a page of the images with these embeddings [P, D]; ages are random."""
    rng = np.random.default_rng(0)
    count = len(embeddings)
    neighbors, similarities = _nearest(embeddings, k)
    ages = rng.integers(0, 4096, neighbors.shape) if aged else None
    chosen = tuple(range(min(6, count))) if queries is None else tuple(queries)
    complete = np.ones(count, bool)
    complete[list(incomplete)] = False
    positions = embeddings @ np.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)[2][:2].T
    positions = (positions - positions.min(0)) / np.maximum(np.ptp(positions, axis=0), 1e-6)
    found, cluster_of = _clusters(embeddings, labels, classes, clusters, members, rng)
    return Explorer(
        protocol=InspectionProtocol(
            checkpoint="runs/first/checkpoints/step-00001234",
            run=run,
            step=1234,
            epoch=39.81,
            searched="bank" if aged else "dataset",
            entries=3000,
            capacity=4096 if aged else None,
            dtype="bfloat16",
            encoder="target",
            view="shorter side 32 px, centre 32 px",
            k=k,
            selection="random",
            seed=0,
            data={"kind": "demo"},
            dataset_size=4000,
            version="0.1.0",
        ),
        classes=classes,
        nodes=Nodes(
            ids=np.arange(count) * 7 + 3,
            names=tuple(names) if names else tuple(f"images/{index * 7 + 3:06}.png" for index in range(count)),
            labels=labels,
            pictures=tuple(pictures) if pictures else drawn(count),
        ),
        graph=Graph(neighbors=neighbors, similarities=similarities, ages=ages, complete=complete),
        queries=chosen,
        order=order,  # type: ignore[arg-type]
        statistics=_statistics(neighbors, similarities, ages, labels, classes),
        evolution=tuple(_moment(step, each, chosen, labels, k) for step, each in enumerate(evolution, start=1)),
        clusters=found,
        cluster_of=cluster_of,
        pairs=_pairs(neighbors, similarities),
        outliers=_outliers(neighbors, similarities),
        map=EmbeddingMap(
            method="pca",
            nodes=np.arange(count),
            positions=positions.astype(np.float32),
            note="41% of the variance is in these two dimensions",
        )
        if with_map
        else None,
    )


def random_explorer(count: int = 40, *, kinds: int = 3, seed: int = 0, **options: Any) -> Explorer:
    """Contents of a page of images in `kinds` classes, one Gaussian cloud each; 0: no labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, kinds, count) if kinds else np.full(count, -1)
    centers = rng.normal(size=(max(1, kinds), 16))
    embeddings = centers[labels] + 0.9 * rng.normal(size=(count, 16))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    options.setdefault("classes", tuple(f"class {index}" for index in range(kinds)) if kinds else None)
    if options.pop("with_evolution", False):
        options["evolution"] = [_unit(embeddings + noise * rng.normal(size=embeddings.shape)) for noise in (1, 0.4, 0)]
    return make_explorer(embeddings.astype(np.float32), labels, **options)


def _unit(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)


def _nearest(embeddings: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -2)
    neighbors = np.argsort(-similar, axis=1)[:, :k]  # [P, K]
    found = np.take_along_axis(similar, neighbors, 1)
    padding = k - neighbors.shape[1]
    neighbors = np.pad(np.where(found > -2, neighbors, -1), ((0, 0), (0, padding)), constant_values=-1)
    return neighbors, np.pad(np.where(found > -2, found, 0), ((0, 0), (0, padding))).astype(np.float32)


def _statistics(
    neighbors: NDArray[np.int64],
    similarities: NDArray[np.float32],
    ages: NDArray[np.int64] | None,
    labels: NDArray[np.int64],
    classes: tuple[str, ...] | None,
) -> Statistics:
    there = neighbors >= 0  # [P, K]
    compared = there & (labels[neighbors] >= 0) & (labels >= 0)[:, None]
    match = compared & (labels[neighbors] == labels[:, None])

    def histogram(values: NDArray[Any]) -> Histogram:
        low, high = (float(values[there].min()), float(values[there].max())) if there.any() else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, 31)
        return Histogram(
            edges=edges,
            matching=np.histogram(values[match], edges)[0],
            others=np.histogram(values[there & ~match], edges)[0],
        )

    retrieved = np.bincount(neighbors[there], minlength=len(labels))
    by_class = [
        ClassPurity(
            name=name,
            purity=(purity := float(match[rows].sum() / compared[rows].sum())),
            interval=_interval(purity),
            images=int(rows.sum()),
        )
        for index, name in enumerate(classes or ())
        if compared[rows := labels == index].any()
    ]

    def mean(values: NDArray[Any], where: NDArray[np.bool_]) -> float | None:
        return float(values[where].mean()) if where.any() else None

    ranks = range(neighbors.shape[1])
    purity = mean(match, compared)
    return Statistics(
        summary=Summary(
            images=len(labels),
            purity=purity,
            purity_interval=None if purity is None else _interval(purity),
            chance=1 / len(classes) if classes and compared.any() else None,
            purity_by_rank=tuple(mean(match[:, rank], compared[:, rank]) for rank in ranks),
            similarity=mean(similarities, there),
            similarity_by_rank=tuple(mean(similarities[:, rank], there[:, rank]) for rank in ranks),
            age=None if ages is None else mean(ages, there),
        ),
        similarity=histogram(similarities),
        age=None if ages is None else histogram(ages),
        hubs=tuple(
            Hub(
                node=int(node),
                retrieved=int(retrieved[node]),
                matching=float((labels[(neighbors == node).any(1)] == labels[node]).mean())
                if labels[node] >= 0
                else None,
            )
            for node in np.argsort(-retrieved, kind="stable")[:12]
            if retrieved[node]
        ),
        never_retrieved=float((retrieved == 0).mean()),
        purity_by_class=tuple(sorted(by_class, key=lambda row: row.purity)),
        confusion=_confusion(neighbors, labels, len(classes)) if classes and compared.any() else None,
    )


def _interval(purity: float) -> tuple[float, float]:
    return max(0.0, purity - 0.04), min(1.0, purity + 0.05)


def _confusion(neighbors: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> Confusion:
    counts = np.zeros((classes, classes), np.int64)
    for row, others in zip(labels, neighbors, strict=True):
        for other in others[others >= 0]:
            counts[row, labels[other]] += 1
    shown = np.arange(classes)[:40]
    return Confusion(labels=shown, counts=counts[:40, :40], totals=counts.sum(axis=1)[:40], present=classes)


def _pairs(neighbors: NDArray[np.int64], similarities: NDArray[np.float32]) -> tuple[tuple[int, int, float], ...]:
    pairs = {
        (min(node, int(other)), max(node, int(other))): float(similarities[node, rank])
        for node, row in enumerate(neighbors)
        for rank, other in enumerate(row)
        if other >= 0
    }
    return tuple((*pair, value) for pair, value in sorted(pairs.items(), key=lambda item: -item[1])[:60])


def _outliers(neighbors: NDArray[np.int64], similarities: NDArray[np.float32]) -> tuple[tuple[int, float], ...]:
    means = [
        (node, float(similarities[node][row >= 0].mean())) for node, row in enumerate(neighbors) if (row >= 0).any()
    ]
    return tuple(sorted(means, key=lambda each: each[1])[:30])


def _moment(
    step: int, embeddings: NDArray[np.float32], queries: Sequence[int], labels: NDArray[np.int64], k: int
) -> Moment:
    neighbors, similarities = (rows[list(queries)] for rows in _nearest(embeddings, k))
    match = (labels[neighbors] == labels[list(queries)][:, None])[neighbors >= 0]
    return Moment(
        step=390 * step,
        epoch=10.0 * step,
        neighbors=neighbors,
        similarities=similarities,
        images=500,
        purity=float(match.mean()),
        purity_interval=_interval(float(match.mean())),
    )


def _clusters(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: tuple[str, ...] | None,
    count: int,
    members: int,
    rng: np.random.Generator,
) -> tuple[tuple[Cluster, ...], NDArray[np.int64] | None]:
    if not count:
        return (), None
    centers = embeddings[rng.choice(len(embeddings), count, replace=False)]
    for _ in range(8):
        nearest = (embeddings @ centers.T).argmax(1)
        centers = _unit(np.stack([embeddings[nearest == index].sum(0) for index in range(count)]) + 1e-9)
    order = np.argsort(-np.bincount(nearest, minlength=count), kind="stable").tolist()
    found = []
    for index in order:
        inside = np.flatnonzero(nearest == index)
        known = labels[inside][labels[inside] >= 0].tolist()
        largest = Counter(known).most_common(3) if classes else []
        found.append(
            Cluster(
                size=len(inside),
                members=tuple(rng.permutation(inside)[:members].tolist()),
                classes=tuple((classes[label], number / len(known)) for label, number in largest if classes),
            )
        )
    return tuple(found), np.array([order.index(index) for index in nearest])
