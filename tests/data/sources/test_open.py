from __future__ import annotations

import numpy as np

from msf_faiss.config import DemoData
from msf_faiss.data.sources.open import open_source


def test_the_demo_has_separate_held_out_images() -> None:
    config = DemoData(images=40, test_images=20, size=16)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train is not None
    assert test is not None
    assert (len(train), len(test)) == (40, 20)
    assert train.classes == test.classes
    assert train.labels is not None
    assert set(np.unique(train.labels)) <= set(range(len(train.classes or ())))
    seen = {image.numpy().tobytes() for image in map(train.decode, range(40))}
    assert len(seen) == 40
    assert not seen & {image.numpy().tobytes() for image in map(test.decode, range(20))}
