import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from msf_faiss.config import Config, FlatBankConfig, OptimizerConfig, TrainConfig, ViewsConfig
from msf_faiss.config.load import dump_config, load_config

# By key: values that are valid together with any of the other keys.
CHOICES: dict[str, list[Any]] = {
    "data": [
        {"kind": "demo", "images": 77, "seed": 2**40},
        {"kind": "folder", "path": "a b/# c: d", "labels": "none", "workers": 3},
        {"kind": "parquet", "path": "1e5", "test_path": "null", "label_column": None, "image_column": "yes"},
        {"kind": "webdataset", "path": "a-{00..11}.tar", "image_keys": ["no", "1"], "label_key": None},
        {"kind": "huggingface", "path": "a/b", "split": "train[:10%]", "revision": "1e5", "name": "null"},
        {"kind": "cifar100", "root": "~", "download": False, "unreadable": "skip", "unreadable_limit": 0},
    ],
    "model": [
        {"backbone": {"kind": "narrow", "width": 7, "depths": [1, 2], "strides": [4, 1]}, "dim": 3},
        {"backbone": {"kind": "torchvision", "name": "wide_resnet50_2", "stem": "cifar"}, "hidden": 10},
    ],
    "bank": [
        {"kind": "flat", "k": 1, "capacity": 1},
        {"kind": "reference", "capacity": 2**40, "dtype": "float16", "max_age": 4},
        {"kind": "scan", "scan": "pq", "capacity": "1.5GiB", "recall_check": {"every_steps": 7}},
        {"kind": "ivf", "capacity": "dataset", "ivf": {"lists": 64, "segments": 3}, "min_recall": 1},
    ],
    "optimizer": [{"learning_rate": 1e-5, "weight_decay": 1e-30}, {"learning_rate": 1 / 3, "warmup_epochs": 0.1}],
    "views": [
        {"weak": {"crop_scale": [1e-9, 1e-8]}, "strong": {"blur_sigma": [2, 1e20]}},
        {"mean": [0, -1.5, 1e-7]},
    ],
    "target": [{"momentum": 0, "final_momentum": 1}, {"final_momentum": None}],
    "train": [{"max_steps": 10**15, "threads": 1}, {"precision": "bfloat16"}],
    "knn": [{"every_epochs": None}, {"k": 3}],
    "seed": [2**31 - 1, 0],
}


@pytest.mark.parametrize("seed", range(30))
def test_dumped_random_configs_load_as_equal(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    config = Config.model_validate({name: draw.choice(each) for name, each in CHOICES.items() if draw.random() < 0.8})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


def test_configs_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


def test_a_broken_rule_names_its_keys() -> None:
    with pytest.raises(ValidationError, match=r"k: must be at most capacity \(5\), found 6") as caught:
        FlatBankConfig(k=6, capacity=5)
    assert caught.value.errors()[0]["ctx"]["keys"] == ("k", "capacity")


def test_a_constant_schedule_allows_any_warmup() -> None:
    Config(train=TrainConfig(epochs=5), optimizer=OptimizerConfig(warmup_epochs=5, schedule="constant"))


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (96, 110), (95, 95), (32, 32)])
def test_views_resize(size: int, resize: int) -> None:
    assert ViewsConfig(size=size).resize == resize
    assert ViewsConfig(size=size, eval_resize=300).resize == 300
