"""Measure opening a folder of a million images, with and without its cached listing.

    python benchmarks/listing.py [--images 1000000] [--classes 1000] [--rounds 5] [--folder /dev/shm]

The files are empty, named CLASS/CLASS_NUMBER.JPEG as in ImageNet, and removed at the end. Variants take turns within
each round, so that a busy machine slows all of them. Times are medians in seconds, ratios are medians of the ratios of
each round. With --cold, the kernel's caches are dropped before each measurement (needs root).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.listing import list_images

LISTED, CACHED = "listed", "from the cache"


def make(root: Path, images: int, classes: int) -> None:
    for number in range(classes):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        for index in range(images // classes):
            os.close(os.open(folder / f"{folder.name}_{index}.JPEG", os.O_CREAT, 0o644))


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1_000, help="number of folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to create the files")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root, cache = Path(temporary, "images"), Path(temporary, "cache")
        root.mkdir()
        make(root, arguments.images, arguments.classes)
        time.sleep(3.1)  # listings of younger folders are not cached
        list_images(root, cache)
        (cached,) = cache.iterdir()
        measured: dict[str, Callable[[], object]] = {
            LISTED: lambda: list_images(root),
            CACHED: lambda: list_images(root, cache),
            f"source, {LISTED}": lambda: FolderSource(root),
            f"source, {CACHED}": lambda: FolderSource(root, cache=cache),
        }
        times: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(arguments.rounds):
            for name, work in measured.items():
                if arguments.cold:
                    drop_caches()
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
        print(f"{arguments.images:,} images in {arguments.classes:,} folders; listing: {cached.stat().st_size:,} bytes")
    for name, found in times.items():
        listed = times[name.replace(CACHED, LISTED)]
        ratio = statistics.median(slow / own for slow, own in zip(listed, found, strict=True))
        print(f"{statistics.median(found):8.3f} s  {ratio:6.1f} x  {name}")


if __name__ == "__main__":
    main()
