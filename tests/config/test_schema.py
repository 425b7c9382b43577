import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from msf_faiss.config import Config, FlatBankConfig, FolderData, OptimizerConfig, StrongView, TrainConfig, ViewsConfig
from msf_faiss.config.load import dump_config, load_config
from msf_faiss.config.sections import SECTIONS

# For each key, values that suit any others drawn for the same config.
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
def test_any_config_survives_being_written_and_read(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    config = Config.model_validate({name: draw.choice(each) for name, each in CHOICES.items() if draw.random() < 0.8})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


def test_configs_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlatBankConfig(k=6, capacity=5), r"k: must be at most capacity \(5\), found 6"),
        (lambda: StrongView(crop_scale=(0.0, 1.0)), "crop_scale: must be two shares"),
        (lambda: StrongView(blur_sigma=(2.0, 1.0)), "blur_sigma: the first must not be above the second"),
        (lambda: ViewsConfig(size=64, eval_resize=63), r"eval_resize: must be at least size \(64\)"),
        (
            lambda: Config(train=TrainConfig(epochs=5), optimizer=OptimizerConfig(warmup_epochs=5)),
            r"optimizer.warmup_epochs: must be below train.epochs \(5\)",
        ),
    ],
)
def test_rules_between_keys(make: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_constant_schedule_has_no_warm_up_to_fit() -> None:
    Config(train=TrainConfig(epochs=5), optimizer=OptimizerConfig(warmup_epochs=5, schedule="constant"))


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (96, 110), (95, 95), (32, 32)])
def test_the_shorter_side_before_the_centre_crop(size: int, resize: int) -> None:
    assert ViewsConfig(size=size).resize == resize
    assert ViewsConfig(size=size, eval_resize=300).resize == 300


def test_the_tree_holds_every_section_and_kind() -> None:
    names = {".".join(map(str, key)) for key in SECTIONS}
    assert names == {
        "",
        *("data", "views", "views.weak", "views.strong", "model", "model.backbone"),
        *("bank", "bank.ivf", "bank.recall_check", "optimizer", "target", "train", "checkpoint", "knn"),
    }
    assert SECTIONS["data",].models["folder"] is FolderData
    assert list(SECTIONS["data",].models) == [
        "demo",
        "folder",
        "parquet",
        "webdataset",
        "huggingface",
        "cifar10",
        "cifar100",
        "stl10",
    ]
    assert SECTIONS["data",].shared == {"kind", "workers", "cache", "unreadable", "unreadable_limit"}
    assert SECTIONS["model", "backbone"].default == "torchvision"


def test_configs_are_read_without_torch() -> None:
    code = "import sys, msf_faiss.config.load as c; c.load_config('demo'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'numpy'", "'click'"} & set(done.stdout.strip("[]\n").split(", "))
