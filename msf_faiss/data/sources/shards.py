"""The files (shards) of a data set: one, those of a folder or of one split in it, or those that a pattern matches."""

import errno
import fnmatch
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from msf_faiss.data.sources.optional import import_optional
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of, list_names
from msf_faiss.text import printable

Ending = Literal[".parquet", ".tar"]

_MOST_NAMES = 1_000_000  # that braces may expand to
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Splits by the words for them, as on the Hugging Face hub."""

_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}")  # custom names of splits on the Hugging Face hub


class Shards(NamedTuple):
    """Files in order, and which files were left out, if any."""

    files: list[Path]
    notes: list[str]


def is_pattern(path: Path) -> bool:
    """Whether a path has characters of patterns. An existing file or folder may have them too."""
    return not set("{}*?[]").isdisjoint(str(path))


def kind_of_data(path: Path, remedy: str) -> Literal["file", "folder", "special"] | None:
    """`kind_of`, but a pattern may be longer than a file's name."""
    try:
        return kind_of(path, remedy)
    except UserError as error:
        if is_pattern(path) and getattr(error.__cause__, "errno", None) == errno.ENAMETOOLONG:
            return None
        raise


def find_shards(path: Path, ending: Ending, setting: str) -> Shards:
    """The shards at `path`: a file, a folder of files with this ending, or a pattern with {a..b}, {a,b}, *, ? and [].

    Names that exist are taken literally. Of a folder with several splits by the names of the Hugging Face hub, the
    training split is taken, or the held-out one if `setting`, the key of `path` in the config, is data.test_path.

    Raises:
        UserError: if there is no such file, a file cannot be looked at, or the split to take is not clear.
    """
    kind_of_file = "Parquet" if ending == ".parquet" else "tar"
    remedy = (
        f"set {setting} to a {kind_of_file} file on this machine, a folder of them or a pattern such as"
        f" train-{{0000..0146}}{ending} or train-*{ending}"
    )
    kind = kind_of_data(path, remedy)
    if kind == "file":
        return Shards([path], [])
    if kind == "special":
        raise UserError(f"{printable(path)} is neither a file nor a folder; {remedy}")
    shards = _in_folder(path, ending, setting, remedy) if kind else _matching(path, setting, remedy)
    for file in shards.files:
        if kind_of(file, remedy) != "file":
            raise UserError(
                f"{printable(file)} is not a file; remove it, or set {setting} to other {kind_of_file} files"
            )
    return shards


def _in_folder(path: Path, ending: Ending, setting: str, remedy: str) -> Shards:
    names = list_names(path, remedy)
    found = [name for name in names if ending in Path(name.lower()).suffixes]
    found = [name for name in found if name.lower().endswith(ending)] or found  # reading explains what is wrong
    if not found:
        deeper = [name for name in names if _contains(path / name, ending)]
        where = f", but its subfolder {printable(deeper[0])} does" if deeper else ""
        raise UserError(f"{printable(path)} contains no *{ending} files{where}; {remedy}")
    splits = _split_names(found)
    counts = Counter(splits)
    if len(counts) == 1:
        return Shards([path / name for name in found], [])
    taken = _choose_splits(counts, held_out=setting == "data.test_path")
    if not taken:
        raise UserError(
            f"{printable(path)} contains files of the splits {_list_splits(counts)}, and none for training; set"
            f" {setting} to a pattern such as {printable(path)}/{next(filter(None, splits))}-*{ending}"
        )
    left = Counter({split: count for split, count in counts.items() if split not in taken})
    used = Counter({split: counts[split] for split in taken})
    note = (
        f"{printable(path)}: uses the files of {_list_splits(used)} and leaves out {_list_splits(left)}; to use others,"
        f" set {setting} to a pattern such as *-train-*{ending}"
    )
    files = [path / name for name, split in zip(found, splits, strict=True) if split in taken]
    return Shards(files, [note] if left else [])


def _contains(folder: Path, ending: Ending) -> bool:
    return kind_of(folder) == "folder" and any(name.lower().endswith(ending) for name in list_names(folder))


def _split_names(names: Sequence[str]) -> list[str]:
    """The split of each file by the hub's conventions, "" if its name has none: a word such as train or val, or what
    precedes -00000-of-00004. Words that all names have tell nothing."""
    words = [re.split("[^a-z]+", name.lower()) for name in names]
    common = set.intersection(*map(set, words))
    splits = []
    for name, its_words in zip(names, words, strict=True):
        known = [SPLITS[word] for word in its_words if word in SPLITS and word not in common]
        numbered = _NUMBERED.match(name)
        splits.append(known[0] if known else numbered[1] if numbered else "")
    return splits


def _choose_splits(counts: Counter[str], *, held_out: bool) -> set[str]:
    """The splits to take of several: the one for this purpose, or those whose names do not say what they are for."""
    others = set(counts) - set(SPLITS.values())
    preferred = ("test", "validation") if held_out else ("train",)
    return next(({split} for split in preferred if split in counts), others)


def _list_splits(counts: Counter[str]) -> str:
    return " and ".join(
        f"{split or 'no split'} ({count:,} file{'' if count == 1 else 's'})" for split, count in sorted(counts.items())
    )


def _matching(path: Path, setting: str, remedy: str) -> Shards:
    base, rest = Path(path.anchor), path.relative_to(path.anchor).parts
    while rest and kind_of_data(base / rest[0], remedy) == "folder":  # folders that exist are no patterns
        base, rest = base / rest[0], rest[1:]
    files: list[Path] = []
    pattern = str(Path(*rest))
    for one in _expand_braces(pattern, path, setting):
        found = list(dict.fromkeys(_glob(base, Path(one).parts, remedy)))
        if not found:
            of = "" if one == pattern else f" (of {printable(path)})"
            raise UserError(f"{printable(base / one)}{of} does not exist; {remedy}")
        files += found
    counts = Counter(_split_names([file.name for file in files]))
    several = len(counts) > 1
    return Shards(
        files, [f"{printable(path)} matches files of {_list_splits(counts)}; all are used"] if several else []
    )


def _expand_braces(pattern: str, path: Path, setting: str) -> list[str]:
    if not {"{", "}"} & set(pattern):
        return [pattern]
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    lists = re.findall(r"\{([^{}]*,[^{}]*)\}", pattern)
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
    if count * math.prod(text.count(",") + 1 for text in lists) > _MOST_NAMES:
        raise UserError(
            f"{printable(path)} stands for more than {_MOST_NAMES:,} files; correct the numbers in {setting}, or use *"
        )
    try:
        expanded: list[str] = import_optional("webdataset.shardlists", "webdataset").expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # unbalanced braces, an undefined variable
        raise UserError(f"{printable(path)} is not a valid pattern: {error}; correct {setting}") from error
    return expanded


def _glob(base: Path, parts: Sequence[str], remedy: str) -> Iterator[Path]:
    """What exists below `base` and matches, in the order of names. A part that exists is taken literally."""
    for index, part in enumerate(parts):
        if not is_pattern(Path(part)) or kind_of_data(base / part, remedy) is not None:
            base = base / part
            continue
        if kind_of(base, remedy) != "folder":
            return
        for name in list_names(base, remedy):
            if part == "**":
                if kind_of(base / name, remedy) == "folder" and not (base / name).is_symlink():
                    yield from _glob(base / name, parts[index:], remedy)
            elif fnmatch.fnmatchcase(name, part) or fnmatch.fnmatchcase(name, part.replace("[", "[[]")):
                yield from _glob(base / name, parts[index + 1 :], remedy)
        if part == "**":
            yield from _glob(base, parts[index + 1 :], remedy)
        return
    if os.path.lexists(base):
        yield base
