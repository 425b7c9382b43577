"""Which checkpoint a run goes on from, and whether it may with the config that it is given."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint, find_newest_valid, list_checkpoints
from msf_faiss.config import Config
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError

Resume = Path | Literal["auto", "never"]
"""auto: go on with the run in the directory, if it holds one. never: the directory must be new. A path: begin a new run
from that checkpoint, or from the newest of that run."""

# Of another shape the weights do not fit, and with another batch size a step is another part of an epoch.
_FIXED = ("model", "train.batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Where a run goes on from."""

    checkpoint: Checkpoint
    damaged: dict[Path, str]  # newer checkpoints of the same run, and what is wrong with them
    origin: str | None  # the checkpoint of another run that this one began from


def find_beginning(run_dir: Path, resume: Resume, ranks: Ranks) -> Beginning | None:
    """The checkpoint that a run in `run_dir` goes on from; None: it begins anew. All ranks take part.

    Raises:
        UserError: if there is none where there should be one, all are damaged, or `run_dir` holds another run than
            one that began from the checkpoint `resume`.
    """
    path = None if isinstance(resume, str) else resume.resolve()
    if ranks.broadcast_object(bool(list_checkpoints(run_dir))):
        checkpoint, damaged = find_newest_valid(run_dir, ranks)
        if path is not None and not _continues(checkpoint, path):
            raise UserError(
                f"{run_dir}: holds a run that goes on from {checkpoint.path.name}, not from {resume}; "
                "choose a new directory with --out, or leave --resume out to continue the run there"
            )
        return Beginning(checkpoint=checkpoint, damaged=damaged, origin=checkpoint.origin)
    if path is None:
        return None
    if list_checkpoints(path):
        checkpoint, damaged = find_newest_valid(path, ranks)
    else:
        checkpoint, damaged = find_checkpoint(path), {}
    return Beginning(checkpoint=checkpoint, damaged=damaged, origin=str(checkpoint.path))


def _continues(newest: Checkpoint, path: Path) -> bool:
    """Whether a run whose newest checkpoint is `newest` goes on from `path`, a checkpoint or the directory of a run."""
    places = [newest.path.resolve(), *([Path(newest.origin)] if newest.origin else [])]
    return any(place.is_relative_to(path) for place in places)


def allowed_changes(run: Path, old: Config, new: Config, allowed: Sequence[str]) -> list[str]:
    """Where two configs differ, as `key: this there, that now`.

    Args:
        run: what the old config belongs to, for messages.
        old: the config of a checkpoint.
        new: the config to go on with.
        allowed: keys, or the sections that they are in, that may differ.

    Raises:
        UserError: if others differ, or one of `allowed` does not exist.
    """
    before, now = (config.model_dump(mode="json") for config in (old, new))
    known = {*_keys(before), *_keys(now)}
    for key in allowed:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else "; `msf-faiss pretrain --dry-run` prints all keys"
            raise UserError(f"--allow-config-change {key}: there is no such key{hint}")
    changes = _differences(before, now)
    fixed = {key: text for key, text in changes.items() if _is_in(key, _FIXED)}
    if fixed:
        raise UserError(
            f"{run}: its run has another config ({'; '.join(fixed.values())}), and these cannot change within a run; "
            "start a new run with another --out"
        )
    refused = {key: text for key, text in changes.items() if not _is_in(key, allowed)}
    if refused:
        flags = " ".join(f"--allow-config-change {key}" for key in refused)
        raise UserError(
            f"{run}: its run has another config ({'; '.join(refused.values())}); continue it with its own (give --out "
            f"alone), allow the change with {flags}, or start a new run with another --out"
        )
    return list(changes.values())


def _is_in(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """All keys, sections included, dotted."""
    found = []
    for key, value in values.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{key}.")
    return found


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Each key with another value, and that in words. Keys that only one of two kinds has follow from `kind`."""
    found: dict[str, str] = {}
    for key in [key for key in old if key in new]:
        before, after, name = old[key], new[key], f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            found |= _differences(before, after, f"{name}.")
        elif before != after:
            found[name] = f"{name}: {_as_yaml(before)} there, {_as_yaml(after)} now"
    return found


def _as_yaml(value: object) -> str:
    """A setting as a config file spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
