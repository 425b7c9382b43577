"""The kind of data at a path, for commands that take only a path."""

from pathlib import Path
from typing import Any

from msf_faiss.config import CachedSource, DataConfig, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.data.sources.shards import is_pattern, kind_of_data
from msf_faiss.errors import UserError
from msf_faiss.files import list_names
from msf_faiss.text import printable

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # of Hugging Face `datasets`
_KEPT = ("workers", "unreadable", "unreadable_limit", "max_pixels")


def detect_data(path: Path, like: DataConfig) -> DataConfig:
    """The config of the data at `path`, with the defaults of their kind.

    A .parquet file or a pattern of them is Parquet, a .tar file or a pattern of them WebDataset. A folder is what
    `save_to_disk` wrote, Parquet or WebDataset if such files are directly in it, and otherwise a folder of image files.

    Args:
        path: a file, a folder or a pattern.
        like: config whose `workers`, `unreadable`, `unreadable_limit`, `max_pixels` and `cache_dir` are kept.

    Raises:
        UserError: if nothing is there, or it is a file of another kind.
    """
    kept: dict[str, Any] = {name: getattr(like, name) for name in _KEPT}
    kind = _kind(path)
    if isinstance(like, CachedSource) and issubclass(kind, CachedSource):
        kept["cache_dir"] = like.cache_dir
    return kind.model_validate({"path": path, **kept})


def _kind(path: Path) -> type[FolderData | ParquetData | WebDatasetData | HuggingFaceData]:
    remedy = "give a folder of images, a .parquet or .tar file, or a folder or pattern of them"
    found = kind_of_data(path, remedy)
    if found == "folder":
        names = list_names(path, remedy)
        if not set(_SAVED_TO_DISK).isdisjoint(names):
            return HuggingFaceData
        # Hugging Face's folders of images may have a table beside them, of this name.
        extensions = {Path(name).suffix.lower() for name in names if name != "metadata.parquet"}
        if ".parquet" in extensions:
            return ParquetData
        return WebDatasetData if ".tar" in extensions else FolderData
    if found == "file" or (found is None and is_pattern(path)):
        if path.suffix.lower() == ".parquet":
            return ParquetData
        if ".tar" in Path(path.name.lower()).suffixes:
            return WebDatasetData
    problem = "is neither a Parquet nor a tar file" if found else "does not exist"
    if not found and is_pattern(path):
        problem = "is neither a path that exists nor a pattern that ends in .parquet or .tar"
    raise UserError(f"{printable(path)} {problem}; {remedy}; for other data pass --set data.kind=… --set data.path=…")
