"""Choose the checkpoints of a run at which a page repeats its queries."""

from collections.abc import Callable

import numpy as np

from msf_faiss.checkpoint.format import (
    FOLDER,
    Checkpoint,
    DamagedCheckpointError,
    GoneCheckpointError,
    find_checkpoint,
)
from msf_faiss.errors import UserError
from msf_faiss.neighbors.records import Searched


def earlier_checkpoints(
    last: Checkpoint, count: int, searched: Searched, notify: Callable[[str], object]
) -> list[Checkpoint]:
    """The first checkpoint of the run of `last`, and others at even distances before `last`, all intact.

    Args:
        last: the last checkpoint of the evolution, not verified here.
        count: maximum number of checkpoints including `last`, >= 2.
        searched: whether the bank must be intact, or only the model.
        notify: called with a line for each damaged checkpoint.

    Raises:
        UserError: if there are none, or `last` belongs to no run.
    """
    if last.run_dir is None:
        raise UserError(f"{last.path}: --evolution needs the checkpoints of a run; give the run directory")
    needed = ("model", "bank") if searched == "bank" else ("model",)
    intact = []
    for path in sorted(path for path in (last.run_dir / FOLDER).glob("step-*") if path.is_dir()):
        try:
            checkpoint = find_checkpoint(path)
            if checkpoint.step < last.step:
                checkpoint.verify(name for name in checkpoint.files if name.startswith(needed))
                intact.append(checkpoint)
        except (DamagedCheckpointError, GoneCheckpointError) as error:
            notify(f"skipping {error}")
    if not intact:
        raise UserError(
            f"{last.run_dir}: --evolution needs at least two checkpoints, found only {last.path.name}; keep more in "
            "the next run, e.g. --set checkpoint.keep_last=20 or --set checkpoint.keep_every_epochs=10"
        )
    intact.sort(key=lambda checkpoint: checkpoint.step)
    # Positions among all checkpoints, `last` after those in the list.
    chosen = np.unique(np.linspace(0, len(intact), min(count, len(intact) + 1)).round().astype(int))[:-1]
    return [intact[position] for position in chosen]
