"""The images and the config on which a checkpoint's encoder is applied after training."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.checkpoint.images import find_changes
from msf_faiss.config import Config
from msf_faiss.config.load import override_config
from msf_faiss.data.source import Source
from msf_faiss.data.sources.detect import detect_data
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError
from msf_faiss.search.faiss_setup import set_threads

Split = Literal["train", "test"]

_SETTABLE = ("data.", "views.", "train.threads=")

_log = logging.getLogger(__name__)


def override_inputs(config: Config, overrides: Sequence[str], data: Path | None = None) -> Config:
    """A checkpoint's config with other data or views.

    Args:
        config: of the checkpoint.
        overrides: `data.KEY=VALUE`, `views.KEY=VALUE` or `train.threads=N`.
        data: path of the images (see `data.sources.detect.detect_data`); None: the images of the config.

    Raises:
        UserError: if there are no data at `data`, or an override changes anything else.
    """
    for override in overrides:
        if not override.startswith(_SETTABLE):
            raise UserError(
                f"--set {override}: the encoder stays as it was trained; only data.…, views.… and train.threads can be "
                "set"
            )
    if data is not None:
        config = config.model_copy(update={"data": detect_data(data, config.data)})
    return override_config(config, overrides) if overrides else config


def open_inputs(config: Config, split: Split = "train") -> Source:
    """Give torch and FAISS the config's number of threads, and open its training or held-out images.

    Raises:
        UserError: if the data cannot be read, or the config names no held-out images.
    """
    if config.train.threads is not None:
        set_threads(config.train.threads)
    source = open_source(config.data, split)
    if source is None:
        raise UserError(
            "the config names no held-out images; set data.test_path (with data.kind=huggingface: data.test_split), or "
            "name any images with --data"
        )
    return source


def check_bank_images(checkpoint: Checkpoint, source: Source) -> None:
    """Check that the ids in a checkpoint's bank refer to `source`. Changed labels are logged.

    Raises:
        UserError: if `source` has other images than the training data had, or in another order.
    """
    changes = find_changes(checkpoint, source)
    if changes.images is not None:
        raise UserError(
            f"{checkpoint.path}: its bank refers to training images by number, but the data are not those of the "
            f"training: {changes.images}. Point --set data.… at the training data"
        )
    if changes.labels is not None:
        _log.warning("%s: since the training, %s", checkpoint.path, changes.labels)
