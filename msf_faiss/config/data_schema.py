"""Settings of the images: one frozen model per kind of data set.

The string below a field is its description in the JSON Schema and the documentation. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from msf_faiss.config.base import Positive, Section, UserPath

_IMAGE_KEYS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "avif", "heic", "heif", "hif", "jp2", "j2k"),
    *("j2c", "jpc", "jpf", "jpx", "jpe", "jfif", "mpo", "gif", "apng", "avifs", "tga", "dib", "pbm", "pnm", "pcx"),
)


class SourceConfig(Section):
    """Settings of every kind of data."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Number of processes that decode images and make views. "auto": one per core, at most 16; none for images in
    memory, unless a GPU trains on views of 96 px or more."""
    cache: Literal["auto", "none", "memory"] = "auto"
    """Whether to decode all images once, before the first step, and keep them in memory (in that of each rank). "auto":
    if they take at most an eighth of the free memory. The views are the same either way."""
    unreadable: Literal["error", "skip"] = "error"
    """Whether an image that cannot be decoded ends the run ("error") or is left out and counted ("skip")."""
    unreadable_limit: Annotated[int, Field(ge=0)] = 100
    """With `unreadable: skip`, the run ends if more images than this are unreadable."""
    max_pixels: Positive = 178_956_970
    """Images of more pixels, height times width, are unreadable: decoding one takes at least 3 bytes per pixel."""


class DemoData(SourceConfig):
    """Built-in images: ten kinds of generated textures. Nothing to download."""

    kind: Literal["demo"] = "demo"
    images: Annotated[int, Field(ge=10)] = 4_000
    """Number of training images."""
    test_images: Annotated[int, Field(ge=10)] = 1_000
    """Number of held-out images; none of them is a training image."""
    size: Annotated[int, Field(ge=8)] = 32
    """Height and width, in pixels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the textures. It is not the run's seed, so runs with different seeds train on the same images."""


class CachedSource(SourceConfig):
    """Settings of data that take long to open the first time, and are indexed on disk for the next."""

    cache_dir: UserPath | None = None
    """Folder for lists of large folders, unpacked Parquet files and indices of tar files. null: `msf-faiss` in the
    user's cache folder."""


class FolderData(CachedSource):
    """Image files in a folder: one subfolder per class, or any tree of unlabelled images."""

    kind: Literal["folder"] = "folder"
    path: UserPath
    """Folder with the training images."""
    test_path: UserPath | None = None
    """Folder with held-out images. null: evaluations use the training images, leaving out the one being classified."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """"folders": the first level of subfolders names the class. "none": unlabelled. "auto": "folders" if every image is
    exactly one level deep, else "none", with a warning if only some images are."""


class ParquetData(CachedSource):
    """Parquet files in the Hugging Face convention: a column `image{bytes, path}` and, optionally, a label."""

    kind: Literal["parquet"] = "parquet"
    path: UserPath
    """File, folder of files (read in the order of their names) or pattern such as train-*.parquet. Of a folder with
    several splits by the names of the Hugging Face Hub, the training split is used."""
    test_path: UserPath | None = None
    """The same for held-out images; of several splits, the test split is used. null: none."""
    image_column: str = "image"
    """Name of the column with the images: structs of bytes and path, plain bytes, or paths."""
    label_column: str | None = "label"
    """Name of the column with the classes, integers or text; without it the images are unlabelled. null: ignore
    labels."""


class WebDatasetData(CachedSource):
    """Local, uncompressed tar files in the WebDataset convention: consecutive files that differ only in their extension
    form a sample, such as 0001.jpg and 0001.cls."""

    kind: Literal["webdataset"] = "webdataset"
    path: UserPath
    """Tar file, folder of *.tar files (read in the order of their names), or pattern such as train-{0000..0146}.tar. Of
    a folder with several splits by the names of the Hugging Face Hub, the training split is used."""
    test_path: UserPath | None = None
    """The same for held-out images; of several splits, the test split is used. null: none."""
    image_keys: Annotated[tuple[str, ...], Field(min_length=1)] = _IMAGE_KEYS
    """Extensions of image files. Of several images in a sample, the one whose extension comes first here is used;
    samples without an image are left out and counted."""
    label_key: str | None = "cls"
    """Extension of the file with the number of the class; samples without it are unlabelled. null: ignore labels."""
    class_names: UserPath | None = None
    """Text file with the names of the classes, one per line. null: classes are named by their numbers."""


class HuggingFaceData(SourceConfig):
    """Any image data set that the Hugging Face library `datasets` can open."""

    kind: Literal["huggingface"] = "huggingface"
    path: UserPath
    """Folder (written by `save_to_disk`, or of images or Parquet files), or name on the hub, such as ylecun/mnist."""
    name: str | None = None
    """Configuration of the data set, if it has several. null: its default."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit pins the data. null: the latest."""
    split: str = "train"
    """Split with the training images; parts are written as in train[:80%]."""
    test_split: str | None = None
    """Split with held-out images. null: none."""
    image_column: str = "image"
    """Name of the column with the images."""
    label_column: str | None = "label"
    """Name of the column with the classes; without it the images are unlabelled. null: ignore labels."""
    cache_dir: UserPath | None = None
    """Folder in which `datasets` keeps downloads and converted files. null: its own cache folder (HF_HOME)."""


class TorchvisionData(SourceConfig):
    """A data set that torchvision can download."""

    kind: Literal["cifar10", "cifar100", "stl10"]
    root: Annotated[UserPath, Field(validate_default=False)] = Path("data")  # validated JSON has no paths
    """Folder that contains the data set, or to which it is downloaded."""
    download: bool = True
    """Whether to download a missing data set. false: a missing data set is an error."""


DataConfig = Annotated[
    DemoData | FolderData | ParquetData | WebDatasetData | HuggingFaceData | TorchvisionData,
    Field(discriminator="kind"),
]
