"""Data sets that Hugging Face `datasets` can open: from folders and from the hub."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import HuggingFaceData
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import decode_record
from msf_faiss.data.sources.disk_cache import files_identity
from msf_faiss.data.sources.labels import convert_labels, is_label_type, show_apart, text_classes
from msf_faiss.data.sources.optional import import_optional
from msf_faiss.data.sources.parquet_unpack import is_image_type
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of
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
        self._folder = Path()  # of relative paths of images
        rows = _open(datasets, config, split)
        if not len(rows):
            raise UserError(f"{self._title} contains no rows; set another split")
        self.labels, self.classes = self._read_labels(datasets, rows, config, classes)
        self._rows = self._images_of(datasets, rows, config)
        # The fingerprint tells apart selections of rows from the same files.
        self._fingerprint = f"{rows._fingerprint} {config.image_column}"
        self._data_files = [Path(file["filename"]) for file in rows.cache_files]

    def _images_of(self, datasets: Any, rows: Any, config: HuggingFaceData) -> Any:
        """Rows with only the column `image`: encoded bytes, paths or structs of both."""
        column, features = config.image_column, rows.features
        is_image = isinstance(features.get(column), datasets.Image)
        if is_image or (column in features and is_image_type(rows.features.arrow_schema.field(column).type)):
            rows = rows.select_columns([column]).with_format(None)
            if is_image:
                rows = rows.cast_column(column, datasets.Image(decode=False))
            else:
                self._folder = config.path
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
        own = show_apart(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        if not is_label_type(rows.features.arrow_schema.field(column).type):
            raise UserError(
                f"{self._title}: column {column!r} must contain classes, integers or text, but is {feature}; {remedy}"
            )
        if own is not None and classes is not None and own != tuple(classes):
            raise UserError(
                f"the classes of {self._title} are {list(own)}, but the training images have {list(classes)}; set"
                " data.test_split to a split of the same classes"
            )
        values = rows.select_columns([column]).with_format("arrow")[:].column(0)
        names = own or classes or text_classes([values])
        labels = convert_labels(values, f"{self._title}: column {column!r}", names)
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

    def relative_names(self) -> Iterator[str]:
        rows = self._rows.flatten()

        def find(type: str, *names: str) -> Any:
            """The column of this type, not copied; None if there is none."""
            for name in names:
                if name in rows.features and type in str(rows.features[name]):
                    return rows.select_columns([name]).with_format("arrow")[:].column(0)
            return None

        paths = find("string", "image.path", "image")
        # Of selected rows, a column of bytes would be copied into memory.
        encoded = find("binary", "image.bytes", "image") if rows._indices is None else None
        unknown = [None] * len(self)
        sizes = unknown if encoded is None else pc.binary_length(encoded).to_pylist()
        for path, size in zip(unknown if paths is None else paths.to_pylist(), sizes, strict=True):
            yield Path(path).name if path else f"an image of {size} bytes"

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return decode_record(*self._record(index), self._folder, partial(self.name, index), reduce, self._max_pixels)

    def _record(self, index: int) -> tuple[bytes | None, str | None]:
        image = self._rows[index]["image"]
        if isinstance(image, dict):
            return image.get("bytes"), image.get("path")
        return (None, image) if isinstance(image, str) else (image, None)


def _open(datasets: Any, config: HuggingFaceData, split: str) -> Any:
    """The rows of a split."""
    path = config.path
    kind = kind_of(path, "set data.path to a folder, or to a name on the Hugging Face hub")
    if kind not in ("folder", None):
        raise UserError(f"{path} is a file; set data.path to its folder, or for a Parquet file data.kind=parquet")
    if kind is None and not _HUB_NAME.fullmatch(path.as_posix()):
        raise UserError(f"{path} does not exist; set data.path to a folder, or to a name on the Hugging Face hub")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _split_of(datasets, datasets.load_from_disk(str(path), keep_in_memory=False), config, split)
        rows = datasets.load_dataset(
            path.as_posix(),
            config.name,
            split=split,
            revision=config.revision,
            cache_dir=None if config.cache_dir is None else str(config.cache_dir),
            keep_in_memory=False,
        )
        _check_apart(datasets, config, {name: each.num_examples for name, each in (rows.info.splits or {}).items()})
        return rows
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
    """The rows of a split or of parts of splits, of a saved `DatasetDict` or `Dataset`; the latter is called train."""
    single = not isinstance(saved, datasets.DatasetDict)
    splits = dict.fromkeys(("train", str(saved.split)), saved) if single else dict(saved)
    lengths = {name: len(rows) for name, rows in splits.items()}
    _check_apart(datasets, config, lengths)
    if split in splits:
        return splits[split]
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:  # not a specification, or of a split that is not there
        what = "is a single Dataset, whose only split is train" if single else f"has the splits {', '.join(splits)}"
        raise UserError(
            f"{config.path} {what}, and {split!r} is no part of it: {error}; set data.split and data.test_split to a"
            " split or a part such as train[:80%]"
        ) from error
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _check_apart(datasets: Any, config: HuggingFaceData, lengths: Mapping[str, int]) -> None:
    """Refuse held-out rows among the training rows, unless they are the same: then none are held out.

    Raises:
        UserError: if there are, as far as the lengths of the splits tell.
    """
    if config.test_split in (None, config.split):
        return
    try:
        train, test = (
            datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
            for split in (config.split, config.test_split)
        )
    except (ValueError, AssertionError):  # opening them says it
        return
    for a, b in itertools.product(train, test):
        if a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to):
            raise UserError(
                f"{config.path}: data.split ({config.split}) and data.test_split ({config.test_split}) have rows in"
                " common, so that held-out images would be trained on; set parts such as train[:80%] and train[80%:]"
            )
