"""The checkpoints of a run at which to ask the same queries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from msf_faiss.checkpoint.format import FOLDER, Checkpoint, DamagedCheckpointError, find_checkpoint
from msf_faiss.errors import UserError
from msf_faiss.neighbors.records import Searched


def earlier_checkpoints(
    last: Checkpoint, most: int, searched: Searched, notify: Callable[[str], object]
) -> list[Checkpoint]:
    """Whole checkpoints of the run of `last` before it, the first of them and others at even distances.

    Args:
        last: where the evolution ends; verified by those who load it.
        most: as many at most, `last` counted, >= 2.
        searched: what must be whole: the model, and the bank if it is searched.
        notify: is told of each damaged one.

    Raises:
        UserError: if there is none, or `last` belongs to no run.
    """
    if last.run_dir is None:
        raise UserError(f"{last.path}: an evolution goes over the checkpoints of a run; give the run directory")
    needed = ("model", "bank") if searched == "bank" else ("model",)
    whole = []
    for path in sorted(path for path in (last.run_dir / FOLDER).glob("step-*") if path.is_dir()):
        try:
            checkpoint = find_checkpoint(path)
            if checkpoint.step < last.step:
                checkpoint.verify(name for name in checkpoint.files if name.startswith(needed))
                whole.append(checkpoint)
        except DamagedCheckpointError as error:
            notify(f"left out: {error}")
    if not whole:
        raise UserError(
            f"{last.run_dir}: only one checkpoint, {last.path.name}, can be shown, which is no evolution; keep more of "
            "the next run: --set checkpoint.keep_last=20, or --set checkpoint.keep_every_epochs=10 for some of all "
            "epochs"
        )
    whole.sort(key=lambda checkpoint: checkpoint.step)
    # Places among all, `last` being the one after those here.
    chosen = np.unique(np.linspace(0, len(whole), min(most, len(whole) + 1)).round().astype(int))[:-1]
    return [whole[place] for place in chosen]
