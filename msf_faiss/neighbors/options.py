"""Options of an inspection and of a page of neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from msf_faiss.device import CPU
from msf_faiss.neighbors.page_content import MapMethod
from msf_faiss.neighbors.records import Searched, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """Which queries to inspect, and where to search their neighbours.

    Raises:
        ValueError: if `queries`, `k` or `sample` is below 1.
    """

    queries: int = 12  # number of random training images, balanced over the classes; unused if files or ids are given
    files: Sequence[Path] = ()  # image files to use as queries
    ids: Sequence[int] = ()  # training images to use as queries
    worst: bool = False  # instead of random queries, use those of lowest purity (see `statistics.worst_first`)
    k: int = 10  # neighbours per query; fewer if there are fewer other images
    searched: Searched = "bank"
    sample: int = 2000  # random images for the statistics and `worst`; all if the data set is searched
    overrides: Sequence[str] = ()  # changes to the checkpoint's config, see `inputs.override_inputs`
    seed: int = 0  # of all random choices
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if min(self.queries, self.k, self.sample) < 1:
            raise ValueError(f"queries, k and sample must be at least 1: {self}")

    @property
    def selection(self) -> Selection:
        if self.files or self.ids:
            return "chosen"
        return "worst" if self.worst else "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions(InspectOptions):
    """Options of a page."""

    page_images: int = 3000  # images on the page; more if its parts require more
    moments: int = 0  # checkpoints of the evolution, at least 2, the inspected one included; 0: no evolution
    clusters: int = 0  # of k-means over the gallery; 0: none
    map_method: MapMethod | None = None  # None: no map

    def __post_init__(self) -> None:
        InspectOptions.__post_init__(self)
        if self.page_images < 1 or self.moments < 0 or self.moments == 1 or self.clusters < 0:
            raise ValueError(f"page_images must be at least 1, moments 0 or at least 2, clusters at least 0: {self}")
