"""The kind of data at a path, for commands that take only a path."""

from pathlib import Path
from typing import Any

from msf_faiss.config import CachedSource, DataConfig, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")  # of Hugging Face `datasets`
_PATTERN = set("{}*?[]")


def detect_data(path: Path, like: DataConfig) -> DataConfig:
    """The config of the data at `path`, with the defaults of their kind.

    A .parquet file is Parquet; a .tar file or a pattern of them is WebDataset. A folder is what `save_to_disk` wrote,
    Parquet or WebDataset if such files are directly in it, and otherwise a folder of image files.

    Args:
        path: a file, a folder or a pattern.
        like: config whose `workers`, `unreadable`, `unreadable_limit` and `cache_dir` are kept.

    Raises:
        UserError: if nothing is there, or it is a file of another kind.
    """
    kept: dict[str, Any] = {name: getattr(like, name) for name in ("workers", "unreadable", "unreadable_limit")}
    kind = _kind(path)
    if isinstance(like, CachedSource) and issubclass(kind, CachedSource):
        kept["cache_dir"] = like.cache_dir
    return kind.model_validate({"path": path, **kept})


def _kind(path: Path) -> type[FolderData | ParquetData | WebDatasetData | HuggingFaceData]:
    remedy = "give a folder of images, a .parquet or .tar file, or a folder or pattern of them"
    is_pattern = bool(_PATTERN & set(str(path)))
    found = None if is_pattern else kind_of(path, remedy)
    if found == "folder":
        if any((path / name).is_file() for name in _SAVED_TO_DISK):
            return HuggingFaceData
        extensions = {file.suffix.lower() for file in path.iterdir()}
        if ".parquet" in extensions:
            return ParquetData
        return WebDatasetData if ".tar" in extensions else FolderData
    if path.suffix.lower() == ".parquet" and found == "file":
        return ParquetData
    if ".tar" in path.suffixes and (found == "file" or is_pattern):
        return WebDatasetData
    problem = "is neither a Parquet nor a tar file" if found else "does not exist"
    raise UserError(f"{path} {problem}; {remedy}; for other data pass --set data.kind=… --set data.path=…")
