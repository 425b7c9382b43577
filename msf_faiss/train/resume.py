"""Selects the checkpoint that a run resumes from, and compares its config with the current one."""

import contextlib
import difflib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint, find_newest_valid, list_checkpoints, step_of
from msf_faiss.config import Config
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError
from msf_faiss.train.optimizer import Schedule

Resume = Path | Literal["auto", "never"]
"""auto: resume the run in the run directory, if there is one. never: the run directory must be new. A path: start a new
run from that checkpoint, or from the newest checkpoint of that run."""

# Weights of another shape do not fit, and with another batch size the step number means another position in the data.
_FIXED = ("model", "train.batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a run resumes."""

    checkpoint: Checkpoint
    damaged: dict[Path, str]  # newer checkpoints of the same run, and their defects
    origin: str | None  # the checkpoint of another run that this run started from
    origin_seal: str | None  # SHA-256 of its manifest


def find_resume_point(run_dir: Path, resume: Resume, ranks: Ranks) -> ResumePoint | None:
    """The checkpoint from which a run in `run_dir` resumes; None: it starts from scratch. All ranks call this together.

    Raises:
        UserError: if there is no checkpoint at `resume`, all checkpoints are damaged, or `run_dir` contains a run that
            did not start from `resume`.
    """
    path = None if isinstance(resume, str) else Path(os.path.realpath(resume))  # `resolve` raises for a link to itself
    if ranks.broadcast_object(bool(list_checkpoints(run_dir))):
        checkpoint, damaged = find_newest_valid(run_dir, ranks)
        if path is not None and not _descends_from(checkpoint, path):
            raise UserError(
                f"{run_dir}: contains a run that resumes from {checkpoint.path.name}, not from {resume}. "
                "Choose a new directory with --out, or omit --resume to resume the run there"
            )
        return ResumePoint(
            checkpoint=checkpoint, damaged=damaged, origin=checkpoint.origin, origin_seal=checkpoint.origin_seal
        )
    if path is None:
        return None
    if list_checkpoints(path):
        checkpoint, damaged = find_newest_valid(path, ranks)
    else:
        checkpoint, damaged = find_checkpoint(path), {}
    return ResumePoint(checkpoint=checkpoint, damaged=damaged, origin=str(checkpoint.path), origin_seal=checkpoint.seal)


def _descends_from(newest: Checkpoint, path: Path) -> bool:
    """Whether the run of `newest` is the run, or started from the run or checkpoint, at `path`."""
    places = [newest.path.resolve(), *([Path(newest.origin)] if newest.origin else [])]
    if any(place.is_relative_to(path) for place in places):
        return True
    for moved in list_checkpoints(path) or [path]:
        with contextlib.suppress(UserError):
            if find_checkpoint(moved).seal == newest.origin_seal:
                return True
    return False


def check_changes(run: Path, old: Config, new: Config, allowed: Sequence[str]) -> list[str]:
    """The differences between two configs, as `key: was this, now that`.

    Args:
        run: the owner of the old config, for messages.
        old: config of the checkpoint.
        new: config to continue with.
        allowed: keys that may differ, or sections of them.

    Raises:
        UserError: if other keys differ, or one of `allowed` does not exist.
    """
    before, now = (_flatten(config.model_dump(mode="json")) for config in (old, new))
    known = {*before, *now}
    for key in allowed:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {close[0]}?" if close else "`msf-faiss pretrain --dry-run` prints all keys"
            raise UserError(f"--allow-config-change {key}: no such key; {hint}")
    changes = _differences(before, now)
    fixed = {key: text for key, text in changes.items() if _is_in(key, _FIXED)}
    if fixed:
        raise UserError(
            f"{run}: the config differs from the run's ({'; '.join(fixed.values())}), and these settings cannot change "
            "within a run. Resume with the run's config (give --out alone), or start a new run with another --out"
        )
    refused = {key: text for key, text in changes.items() if not _is_in(key, allowed)}
    if refused:
        flags = " ".join(f"--allow-config-change {key}" for key in refused)
        raise UserError(
            f"{run}: the config differs from the run's ({'; '.join(refused.values())}). Resume with the run's config "
            f"(give --out alone), allow the change with {flags}, or start a new run with another --out"
        )
    return list(changes.values())


def refuse_if_finished(point: ResumePoint, run_dir: Path, schedule: Schedule, changes: Sequence[str]) -> None:
    """A run records only settings that it has trained with.

    Raises:
        UserError: if no step is left for a new run, or for changed settings.
    """
    checkpoint, total = point.checkpoint, schedule.total_steps
    branches = checkpoint.run_dir != run_dir
    if checkpoint.step < total or not (branches or changes):
        return
    owner = checkpoint.run_dir or checkpoint.path.parent
    earlier = [path for path in list_checkpoints(owner) if step_of(path) < total]
    key = "train.epochs" if total == schedule.scheduled_steps else "train.max_steps"
    raise UserError(
        f"{checkpoint.path}: the run ends at step {total:,} and this is step {checkpoint.step:,}, so nothing would be "
        + (f"trained with the changed settings ({'; '.join(changes)})" if changes else "trained in the new run")
        + f". Train longer (--set {key}=… --allow-config-change {key})"
        + (f", or start a new run from an earlier checkpoint: --out NEW --resume {earlier[-1]}" if earlier else "")
    )


def _is_in(key: str, sections: Iterable[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All keys, dotted, sections included."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Every key with another value. Keys that exist in only one of the two follow from a `kind`."""
    return {
        key: f"{key}: was {_as_yaml(before)}, now {_as_yaml(new[key])}"
        for key, before in old.items()
        if key in new and before != new[key] and not (isinstance(before, dict) and isinstance(new[key], dict))
    }


def _as_yaml(value: object) -> str:
    """A setting as a config file spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
