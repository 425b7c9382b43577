"""What opening a folder of a million images costs: listed anew, and from the list that was kept.

    python benchmarks/listing.py [--images 1000000] [--classes 1000] [--rounds 5] [--folder /dev/shm]

The files are empty, of the form CLASS/CLASS_NUMBER.JPEG as in ImageNet, and removed at the end. Variants take turns
within each round, so that a busy machine slows all of them; times are seconds (medians), ratios are medians of the
rounds' ratios. With --cold the kernel forgets folders and files before each measurement (needs root).
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

ANEW, KEPT = "listed anew", "list kept"


def make(root: Path, images: int, classes: int) -> None:
    for number in range(classes):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        for index in range(images // classes):
            os.close(os.open(folder / f"{folder.name}_{index}.JPEG", os.O_CREAT, 0o644))


def forget() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1_000, help="folders they lie in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to make them")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root, cache = Path(temporary, "images"), Path(temporary, "cache")
        root.mkdir()
        make(root, arguments.images, arguments.classes)
        time.sleep(3.1)  # younger folders are not trusted
        list_images(root, cache)
        (kept,) = cache.iterdir()
        measured: dict[str, Callable[[], object]] = {
            ANEW: lambda: list_images(root),
            KEPT: lambda: list_images(root, cache),
            f"source, {ANEW}": lambda: FolderSource(root),
            f"source, {KEPT}": lambda: FolderSource(root, cache=cache),
        }
        times: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(arguments.rounds):
            for name, work in measured.items():
                if arguments.cold:
                    forget()
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
        print(
            f"{arguments.images:,} images in {arguments.classes:,} folders; the list has {kept.stat().st_size:,} bytes"
        )
    for name, found in times.items():
        anew = times[name.replace(KEPT, ANEW)]
        ratio = statistics.median(slow / own for slow, own in zip(anew, found, strict=True))
        print(f"{statistics.median(found):8.3f} s  {ratio:6.1f} x  {name}")


if __name__ == "__main__":
    main()
