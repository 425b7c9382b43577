import pytest
from drafts import problems

KINDS = "must be demo, folder, parquet, webdataset, huggingface, cifar10, cifar100 or stl10"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # types
        ("train: {epochs: true}", "train.epochs: must be a whole number, found true"),
        ("train: {epochs: [1]}", "train.epochs: must be a whole number, found [1]"),
        ("train: {epochs: 2.5}", "train.epochs: must be a whole number, found 2.5"),
        ("train: {epochs: 010}", 'train.epochs: must be a whole number, found "010"; write it without quotes'),
        ("seed: '5'", 'seed: must be a whole number, found "5"; write it without quotes or leading zeros'),
        ("target: {momentum: true}", "target.momentum: must be a number, found true"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate: must be a finite number, found NaN"),
        ("data: {kind: cifar10, download: maybe}", 'data.download: must be true or false, found "maybe"'),
        ("data: {workers: many}", 'data.workers: must be a whole number or auto, found "many"'),
        ("checkpoint: 5", "checkpoint: must be a section with keys, found 5"),
        ("data: [1]", "data: must be a section with keys, found [1]"),
        # values
        ("target: {momentum: 1.5}", "target.momentum: must be at most 1.0, found 1.5"),
        ("optimizer: {schedule: epock}", 'optimizer.schedule: must be epoch, step or constant, found "epock"; did you'),
        ("bank: {capacity: -5}", "bank.capacity: must be at least 1, an amount of memory such as 8GiB or dataset, fou"),
        (
            "bank: {capacity: null}",
            "bank.capacity: must be a whole number, an amount of memory such as 8GiB or dataset",
        ),
        # lists
        ("views: {mean: [1, 0, no]}", 'views.mean[2]: must be a number, found "no"'),
        ("views: {mean: [0.5, 0.5, 0.5, 0.5]}", "views.mean: must be a list of 3, found [0.5, 0.5, 0.5, 0.5]"),
        ("views: {weak: {crop_scale: [0.2]}}", "views.weak.crop_scale[1]: is missing; the list needs more entries"),
        # kinds
        ("data: {kind: parket}", f'data.kind: {KINDS}, found "parket"; did you mean parquet?'),
        ("data: {kind: [a]}", f'data.kind: {KINDS}, found ["a"]'),
        ("data: {kind: null}", f"data.kind: {KINDS}, found null"),
        # keys
        ("sead: 1", "sead: no such key; did you mean seed?"),
        ("'': 5", "'': no such key"),
        ("true: 5", "true: no such key"),
        ("knn: {colour: 1}", "knn.colour: no such key; the keys here are every_epochs, k, images"),
        ("train.epochs: 3", "train.epochs: no such key; write epochs inside the section train"),
        ("views: {bank: 3}", "views.bank: no such key; bank is a section at the top level"),
        (
            "data: {path: x}",
            "data.path: kind demo has no such key, only folder, parquet, webdataset and huggingface; change data.kind",
        ),
        ("data: {kind: folder}", "data.path: is required; add it to the file, or pass --set data.path=…"),
        # rules between keys
        ("bank: {capacity: 3, k: 4}", "bank.k: must be at most capacity (3), found 4"),
        ("bank: {max_age: 3}", "bank.k: must be at most max_age + 1 (4), found 5"),
        (
            "views: {weak: {crop_scale: [0, 1]}}",
            "views.weak.crop_scale: must be two numbers above 0 in ascending order",
        ),
        (
            "views: {strong: {blur_sigma: [3, 1]}}",
            "views.strong.blur_sigma: must be two numbers in ascending order, fo",
        ),
        ("views: {size: 64, eval_resize: 32}", "views.eval_resize: must be at least size (64), the side of the centre"),
        (
            "model: {backbone: {kind: narrow, depths: [1]}}",
            "model.backbone.strides: must be as many as depths, one per",
        ),
        ("train: {batch_size: 8, accumulate: 5}", "train.accumulate: must be at most half of batch_size (8), as a"),
        ("model: {predictor: false}", "model.predictor: false needs a train.temperature: without"),
        (
            "optimizer: {warmup_epochs: 9}\ntrain: {epochs: 9}",
            "optimizer.warmup_epochs: must be below train.epochs (9) unless optimizer.schedule is constant, found 9.0",
        ),
    ],
)
def test_message(text: str, problem: str) -> None:
    assert any(line.startswith(f"my.yaml:1: {problem}") for line in problems(text)), problems(text)
