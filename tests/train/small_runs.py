"""A run of twelve steps that takes a second."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from msf_faiss.config import (
    CheckpointConfig,
    Config,
    DemoData,
    FlatBankConfig,
    KnnConfig,
    ModelConfig,
    NarrowBackbone,
    TrainConfig,
    ViewsConfig,
)
from msf_faiss.run.events import Event
from msf_faiss.run.recorder import Recorder
from msf_faiss.train.resume import Resume
from msf_faiss.train.trainer import pretrain

CONFIG = Config(
    seed=1,
    data=DemoData(images=70, test_images=20, size=16),
    views=ViewsConfig(size=16),
    model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1, 1), strides=(2, 2)), dim=8),
    bank=FlatBankConfig(capacity=100, k=3),
    train=TrainConfig(epochs=3, batch_size=16, log_every=1, device="cpu"),
    checkpoint=CheckpointConfig(every_epochs=1, keep_last=10),
    knn=KnnConfig(every_epochs=2, k=5),
)
STEPS = 4  # per epoch: 70 images make 4 complete batches of 16


def changed(**sections: dict[str, object]) -> Config:
    updates = {name: getattr(CONFIG, name).model_copy(update=values) for name, values in sections.items()}
    return CONFIG.model_copy(update=updates)


def run(
    config: Config,
    run_dir: Path,
    *,
    resume: Resume = "never",
    stop_after: int | None = None,
    allow: Sequence[str] = (),
) -> list[Event]:
    """Run and record; with `stop_after`, ask the run to stop after that many steps."""
    asked = itertools.count()
    events = []
    with Recorder(run_dir) as record:
        for event in pretrain(
            config, run_dir, resume=resume, allow_changes=allow, should_stop=lambda: next(asked) == stop_after
        ):
            record(event)
            events.append(event)
    return events
