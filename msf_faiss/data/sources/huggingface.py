"""Data sets that Hugging Face `datasets` can open: from folders and from the hub."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import HuggingFaceData
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import decode_record
from msf_faiss.data.sources.disk_cache import files_identity
from msf_faiss.data.sources.labels import MOST_CLASSES, convert_labels
from msf_faiss.data.sources.optional import import_optional
from msf_faiss.errors import UserError
from msf_faiss.text import printable

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFaceSource:
    """A `Source` of the images in a split.

    `datasets` memory-maps its Arrow files and pickles only their names. Images are decoded here, as in other sources.
    """

    in_memory = False

    def __init__(self, config: HuggingFaceData, split: str, *, classes: Sequence[str] | None = None) -> None:
        """`classes`: names of the training images' classes; None: those of this split.

        Raises:
            UserError: if `datasets` is not installed; if the data set, configuration, split or column does not exist;
                if it cannot be downloaded or read; if labels are out of range.
        """
        datasets = import_optional("datasets", "huggingface")
        self._title, self._max_pixels = f"{config.path}, {split}", config.max_pixels
        rows = _open(datasets, config, split)
        if not len(rows):
            raise UserError(f"{self._title} contains no rows; set another split")
        self.labels, self.classes = self._read_labels(datasets, rows, config, classes)
        self._rows = self._images_of(datasets, rows, config)
        # The fingerprint tells apart selections of rows from the same files.
        self._fingerprint = f"{rows._fingerprint} {config.image_column}"
        self._data_files = [Path(file["filename"]) for file in rows.cache_files]

    def _images_of(self, datasets: Any, rows: Any, config: HuggingFaceData) -> Any:
        """Rows with only the column `image`, a struct of encoded bytes and a path."""
        column, features = config.image_column, rows.features
        if isinstance(features.get(column), datasets.Image):
            rows = rows.select_columns([column]).with_format(None).cast_column(column, datasets.Image(decode=False))
            return rows if column == "image" else rows.rename_column(column, "image")
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        problem = f"contains {features[column]}, not images" if column in features else "does not exist"
        remedy = f"set data.image_column to {' or '.join(images)}" if images else f"columns: {', '.join(features)}"
        raise UserError(f"{self._title}: column {column!r} {problem}; {remedy}")

    def _read_labels(
        self, datasets: Any, rows: Any, config: HuggingFaceData, classes: Sequence[str] | None
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
        column = config.label_column
        feature = rows.features.get(column)
        if feature is None and column in (None, HuggingFaceData.model_fields["label_column"].default):
            return None, None
        remedy = "set data.label_column to another column, or to null to train without labels"
        if feature is None:
            raise UserError(f"{self._title} has no column {column!r} (columns: {', '.join(rows.features)}); {remedy}")
        own = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        if own is None and not re.fullmatch(r"u?int\d+", str(getattr(feature, "dtype", ""))):
            raise UserError(
                f"{self._title}: column {column!r} must contain classes or integers, but is {feature}; {remedy}"
            )
        if own is not None and classes is not None and own != tuple(classes):
            raise UserError(
                f"the classes of {self._title} are {list(own)}, but the training images have {list(classes)}; set"
                " data.test_split to a split of the same classes"
            )
        names = own or classes
        numbers = rows.select_columns([column]).with_format("arrow")[:].column(0)
        where = f"{self._title}: column {column!r}"
        labels = convert_labels(numbers, where, MOST_CLASSES if names is None else len(names))
        if (labels == -1).all():
            return None, None
        return labels, tuple(names or map(str, range(labels.max() + 1)))

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        path = self._record(index)[1]
        return printable(f"{self._title}, row {index}" + (f" ({path})" if path else ""))

    def identity(self) -> str:
        return files_identity(self._data_files, self._fingerprint)

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return decode_record(*self._record(index), Path(), partial(self.name, index), reduce, self._max_pixels)

    def _record(self, index: int) -> tuple[bytes | None, str | None]:
        image = self._rows[index]["image"] or {}
        return image.get("bytes"), image.get("path")


def _open(datasets: Any, config: HuggingFaceData, split: str) -> Any:
    """The rows of a split."""
    path = config.path
    if path.is_file():
        raise UserError(f"{path} is a file; set data.path to its folder, or for a Parquet file data.kind=parquet")
    if not path.is_dir() and not _HUB_NAME.fullmatch(path.as_posix()):
        raise UserError(f"{path} does not exist; set data.path to a folder, or to a name on the Hugging Face hub")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _split_of(datasets, datasets.load_from_disk(str(path), keep_in_memory=False), config, split)
        return datasets.load_dataset(
            path.as_posix(),
            config.name,
            split=split,
            revision=config.revision,
            cache_dir=None if config.cache_dir is None else str(config.cache_dir),
            keep_in_memory=False,
        )
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"{path} is not a local folder, and the Hugging Face hub cannot be reached: {error}; check data.path and"
            " the connection, or download the data set elsewhere and copy it"
        ) from error
    except Exception as error:  # `datasets` raises many types, even IndexError, for damaged files
        cause = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        raise UserError(
            f"{path} cannot be opened as a Hugging Face data set with split {split!r}: {cause}; check data.path,"
            " data.name, data.revision and the split"
        ) from error


def _split_of(datasets: Any, saved: Any, config: HuggingFaceData, split: str) -> Any:
    """The rows of a split of a saved `DatasetDict`, or of a saved `Dataset`, which has no splits."""
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{config.path} has no split {split!r}; its splits are {', '.join(saved)}")
        return saved[split]
    if config.test_split is not None or split not in ("train", str(saved.split)):
        raise UserError(
            f"{config.path} is a single Dataset without splits; leave data.split and data.test_split at their"
            " defaults, or save a DatasetDict"
        )
    return saved
