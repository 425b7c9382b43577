"""What kind of data lies at a path, for those who name a path alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msf_faiss.config import CachedSource, DataConfig, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.errors import UserError

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # of Hugging Face `datasets`
_PATTERN = set("{}*?[]")


def data_at(path: Path, like: DataConfig) -> DataConfig:
    """The config of the data at `path`, with their kind's defaults.

    A file is Parquet if its name ends in .parquet, and a WebDataset if in .tar, as is a pattern of tar files. A folder
    is what `save_to_disk` wrote, Parquet or a WebDataset if such files lie directly in it, and else one of image files.

    Args:
        path: a file, a folder or a pattern.
        like: its `workers`, `unreadable` and `cache_dir` are taken over.

    Raises:
        UserError: if nothing is there, or it is a file of another kind.
    """
    common: dict[str, Any] = {
        "path": path,
        "workers": like.workers,
        "unreadable": like.unreadable,
        "unreadable_limit": like.unreadable_limit,
    }
    kind = _kind(path)
    if isinstance(like, CachedSource) and issubclass(kind, CachedSource):
        common["cache_dir"] = like.cache_dir
    return kind.model_validate(common)


def _kind(path: Path) -> type[FolderData | ParquetData | WebDatasetData | HuggingFaceData]:
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED_TO_DISK):
            return HuggingFaceData
        endings = {file.suffix.lower() for file in path.iterdir()}
        if ".parquet" in endings:
            return ParquetData
        return WebDatasetData if ".tar" in endings else FolderData
    if path.suffix.lower() == ".parquet" and path.is_file():
        return ParquetData
    if ".tar" in path.suffixes and (path.is_file() or _PATTERN & set(str(path))):
        return WebDatasetData
    what = "is neither a Parquet nor a tar file" if path.is_file() else "does not exist"
    raise UserError(
        f"{path} {what}; give a folder of images, a .parquet or .tar file, a folder or a pattern of them; for "
        "other data, --set data.kind=… --set data.path=…"
    )
