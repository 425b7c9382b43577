"""Every door through which files of users come in, under seeded damage: `make fuzz` for all, a small part by default.

A case that fails is named by its number; the same seed and number make the same bytes.
"""

import io
import os
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from doors import refusal
from mutate import mutate
from PIL import Image
from tiff import RGB, tiff

from msf_faiss.config import Config, FolderData, ParquetData, ViewsConfig, WebDatasetData
from msf_faiss.config.load import dump_config, load_config
from msf_faiss.data.sources.open import open_source
from msf_faiss.evaluate.weights import open_weights
from msf_faiss.models import build_model
from msf_faiss.views.random_view import center_crop

SEED = int(os.environ.get("MSF_FAISS_FUZZ_SEED", "0"))
VIEWS = ViewsConfig(size=32)


def cases(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.fuzz)])


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _images() -> dict[str, bytes]:
    """Small files of every format and depth, by ending and kind."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
    rgb = Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    gray16 = Image.fromarray(np.asarray(rgb.convert("L"), np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0132] = 6, 72.0, "2020:01:01 00:00:00"
    frames = [rgb.rotate(90), rgb.rotate(180)]
    files = {
        "png": _encoded(rgb, "PNG", exif=exif),
        "png.gray16": _encoded(gray16, "PNG"),
        "png.alpha": _encoded(rgba, "PNG"),
        "png.palette": _encoded(rgb.quantize(16), "PNG", transparency=3),
        "apng": _encoded(rgb, "PNG", save_all=True, append_images=frames),
        "jpg": _encoded(rgb, "JPEG", exif=exif),
        "jpg.progressive": _encoded(rgb, "JPEG", progressive=True),
        "jpg.cmyk": _encoded(rgb.convert("CMYK"), "JPEG"),
        "webp": _encoded(rgb, "WEBP", exif=exif),
        "webp.lossless": _encoded(rgba, "WEBP", lossless=True),
        "webp.animation": _encoded(rgb, "WEBP", save_all=True, append_images=frames),
        "gif": _encoded(rgb, "GIF", save_all=True, append_images=frames),
        "bmp": _encoded(rgb, "BMP"),
        "ppm": _encoded(rgb, "PPM"),
        "pgm.1023": b"P5 8 8 1023\n" + bytes(range(128)),
        "tga": _encoded(rgba, "TGA"),
        "jp2": _encoded(rgb, "JPEG2000"),
        "tif": _encoded(rgb, "TIFF", exif=exif),
        "tif.lzw": _encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tif.deflate": _encoded(gray16, "TIFF", compression="tiff_adobe_deflate"),
        "tif.jpeg": _encoded(rgb, "TIFF", compression="jpeg"),
        "tif.pages": _encoded(rgb, "TIFF", save_all=True, append_images=frames),
        "tif.signed": tiff(np.arange(64, dtype=np.int16).reshape(8, 8), order=">"),
        "tif.12bit": tiff(np.arange(64, dtype=np.uint16).reshape(8, 8), bits=12),
        "tif.bands": tiff(rng.integers(0, 256, (8, 8, 5), np.uint8), photometric=RGB, extra=[0, 0]),
    }
    if "AVIF" in Image.SAVE:
        files["avif"] = _encoded(rgba, "AVIF")
    return files


def mutants(seeds: list[bytes], count: int) -> Iterator[tuple[int, bytes]]:
    for number in range(count):
        rng = np.random.default_rng([SEED, number])
        yield number, mutate(seeds[number % len(seeds)], rng)


def attempt(number: int, door: Callable[[], object], name: str) -> bool:
    """Whether case `number` is taken."""
    try:
        return refusal(door, name) is None
    except BaseException as error:
        error.add_note(f"case {number}, seed {SEED}")
        raise


@cases(150, 10_000)
def test_images(tmp_path: Path, count: int) -> None:
    kinds = _images()
    taken = 0
    for number, data in mutants(list(kinds.values()), count):
        ending = list(kinds)[number % len(kinds)].partition(".")[0]
        file = tmp_path / f"photo-{number}.{ending}"
        file.write_bytes(data)

        def door(file: Path = file) -> None:
            source = open_source(FolderData(path=tmp_path), "train")
            assert source is not None
            center_crop([source.decode(0)], VIEWS)

        taken += attempt(number, door, file.name if ending in ("png", "jpg", "webp", "tif") else str(tmp_path))
        file.unlink()
    assert 0 < taken < count


def _parquet() -> list[bytes]:
    """Files with different columns: structs and numbers, bytes and text, paths and categories."""
    photo = _images()["png"]
    columns = [
        ([{"bytes": photo, "path": f"{n}.png"} for n in range(6)], [0, 1, 2, 0, 1, 2]),
        ([photo] * 6, ["cat", "dog", None] * 2),
        ([f"{n}.png" for n in range(6)], pa.array(["cat", "dog", None] * 2).dictionary_encode()),
        ([{"bytes": photo}] * 6, [1.0, 0.0, None] * 2),
    ]
    files = []
    for images, labels in columns:
        file = io.BytesIO()
        pq.write_table(pa.table({"image": images, "label": labels}), file)
        files.append(file.getvalue())
    return files


def _tar() -> list[bytes]:
    """Files of each format of headers, with long names and with dots in names."""
    photo = _images()["png"]
    files = []
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for name in ("0.png", "0.cls", f"{'a' * 120}/1.png", "v1.0_2.png", "README", "\xfc.png"):
                data = b"1" if name == "0.cls" else photo
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        files.append(file.getvalue())
    return files


@cases(20, 700)
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_tables_and_shards(tmp_path: Path, kind: str, count: int) -> None:
    originals, ending = (_parquet(), "parquet") if kind == "parquet" else (_tar(), "tar")
    for number, data in mutants(originals, count):
        file = tmp_path / f"shard-{number}.{ending}"
        file.write_bytes(data)
        config = ParquetData if kind == "parquet" else WebDatasetData

        def door(file: Path = file, config: type[ParquetData | WebDatasetData] = config) -> None:
            source = open_source(config(path=file, cache_dir=tmp_path / "cache"), "train")
            assert source is not None
            for index in range(min(len(source), 8)):
                source.decode(index)

        attempt(number, door, file.name)
        file.unlink()


@cases(30, 600)
def test_configs(tmp_path: Path, count: int) -> None:
    for number, data in mutants([dump_config(Config()).encode()], count):
        file = tmp_path / f"config-{number}.yaml"
        file.write_bytes(data)
        attempt(number, lambda file=file: load_config(file), file.name)  # type: ignore[misc]
        file.unlink()


def _plant(root: Path, rng: np.random.Generator, depth: int = 0) -> None:
    """Put something hostile or ordinary below `root`, again and again."""
    photo = _images()["png"]
    for _ in range(int(rng.integers(1, 6))):
        raw = os.fsdecode(bytes(rng.integers(1, 256, int(rng.integers(1, 12))).astype(np.uint8)).replace(b"/", b""))
        names = ["a", "Class 1", " ", "-rf", "caf\xe9", "cafe\u0301", "@eaDir", "x" * 250, raw or "raw"]
        path = root / (names[int(rng.integers(9))] + ["", ".png", ".jpg", ".TIF", ".jpeg "][int(rng.integers(5))])
        try:
            match int(rng.integers(10)):
                case 0 | 1 | 2 if not path.exists():
                    path.write_bytes(photo)
                case 3 if not path.exists():
                    path.write_bytes(rng.bytes(int(rng.integers(0, 40))))
                case 4:
                    path.symlink_to("..")
                case 5:
                    path.symlink_to(path.name)  # to itself
                case 6:
                    os.mkfifo(path)
                case 7:
                    with socket.socket(socket.AF_UNIX) as listener:
                        listener.bind(os.fsencode(path))
                case _ if depth < 4:
                    path.mkdir()
                    _plant(path, rng, depth + 1)
        except (OSError, ValueError):  # it exists, or its name is too long
            continue


@cases(15, 1_000)
def test_folder_trees(tmp_path: Path, count: int) -> None:
    for number in range(count):
        root = tmp_path / f"tree-{number}"
        root.mkdir()
        _plant(root, np.random.default_rng([SEED, number]))

        def door(root: Path = root, labels: bool = number % 2 == 0) -> None:
            source = open_source(FolderData(path=root, labels="auto" if labels else "none"), "train")
            assert source is not None
            for index in range(len(source)):
                refusal(lambda index=index: source.decode(index), source.name(index))  # type: ignore[misc]

        attempt(number, door, root.name)


@cases(5, 250)
@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_foreign_weights(tmp_path: Path, format: str, count: int) -> None:
    state = build_model(load_config("demo").model, seed=0).online.backbone.state_dict()
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    original = safetensors.torch.save(state) if format == "safetensors" else buffer.getvalue()
    for number, data in mutants([original], count):
        file = tmp_path / f"weights-{number}.{format}"
        file.write_bytes(data)

        def door(file: Path = file) -> None:
            weights = open_weights(file, base="demo")
            weights.backbone(weights.trained[0])

        attempt(number, door, file.name)
        file.unlink()
