from pathlib import Path

import pytest
from drafts import parse, problems

from msf_faiss.config import Config, DemoData, FolderData, ParquetData, TorchvisionBackbone, TorchvisionData
from msf_faiss.config.load import override_config
from msf_faiss.errors import UserError


def test_all_problems_are_reported_in_the_order_of_their_places() -> None:
    text = """\
sead: 1
optimizer:
  learning_rate: fast
  lerning_rate: 1
bank:
  capacity: -5
  kind: flat
  kind: flatt
data:
  kind: folder
  pth: images
views:
  strong:
    blur_sigma: [3, 1]
checkpoint: 5
"""
    assert problems(text, "train.epoch=3", "nonsense") == [
        "my.yaml:1: sead: no such key; did you mean seed?",
        'my.yaml:3: optimizer.learning_rate: must be a number, found "fast"',
        "my.yaml:4: optimizer.lerning_rate: no such key; did you mean learning_rate?",
        "my.yaml:6: bank.capacity: must be at least 1, an amount of memory such as 8GiB or dataset, found -5",
        "my.yaml:8: bank.kind: duplicate key (first in line 7); keep one of them",
        "my.yaml:9: data.path: is required; add it to the file, or pass --set data.path=…",
        "my.yaml:11: data.pth: no such key; did you mean path?",
        "my.yaml:14: views.strong.blur_sigma: must be two numbers in ascending order, found [3.0, 1.0]",
        "my.yaml:15: checkpoint: must be a section with keys, found 5",
        "--set train.epoch=3: train.epoch: no such key; did you mean epochs?",
        "--set nonsense: must be KEY=VALUE, such as --set train.epochs=50",
    ]


# Rules between keys


def test_broken_rules_are_reported_together_with_invalid_keys() -> None:
    text = """\
data: {kind: foldr, pth: images}
bank:
  dtype: flaot16
  capacity: 3
optimizer:
  warmup_epochs: 9
train:
  epochs: 9
  steps: 3
"""
    assert [line[: line.index(": must" if ": must" in line else ": no")] for line in problems(text, "bank.k=4")] == [
        "my.yaml:1: data.pth",
        "my.yaml:1: data.kind",
        "my.yaml:3: bank.dtype",
        "my.yaml:6: optimizer.warmup_epochs",
        "my.yaml:9: train.steps",
        "--set bank.k=4: bank.k",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "place"),
    [
        ("bank:\n  capacity: 3", [], "my.yaml:2"),  # where the other key of the rule was written
        ("bank:\n  capacity: 3\n  k: 4", [], "my.yaml:3"),
        ("bank:\n  k: 4", ["bank.capacity=3"], "--set bank.capacity=3"),
        ("bank:\n  dtype: float16", ["bank={max_age: 1}"], "--set bank={max_age: 1}"),
    ],
)
def test_a_broken_rule_is_reported_where_one_of_its_keys_was_written(
    text: str, overrides: list[str], place: str
) -> None:
    (problem,) = problems(text, *overrides)
    assert problem.startswith(f"{place}: bank.k: must be at most")


def test_a_rule_is_not_reported_if_one_of_its_keys_is_invalid() -> None:
    assert problems("bank: {capacity: 3, k: ten}\n") == ['my.yaml:1: bank.k: must be a whole number, found "ten"']
    assert problems("bank: {capacity: 3}\noptimizer: {warmup_epochs: 3}\ntrain: {epochs: -2}") == [
        "my.yaml:1: bank.k: must be at most capacity (3), found 5",
        "my.yaml:3: train.epochs: must be at least 1, found -2",
    ]


# Reading


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("just words", r"my\.yaml:1: must consist of keys and values"),
        ("train:\n\tepochs: 3", r"my\.yaml:2: not valid YAML: .*; check indentation, quotes and colons"),
        ("train: [1", r"my\.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2", r"my\.yaml:2: not valid YAML"),
        ("a: *b", r"my\.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("seed: 1\n# \x07", r"my\.yaml:2: not valid YAML: contains a control character; remove it"),
    ],
)
def test_a_text_that_is_not_a_config_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"^{problem}"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a {b: *a}", "a.b: refers to itself; write the values out"),
        ("bank: {<<: 5}", "bank.<<: must name another section"),
        ("bank: &b {<<: *b}", "bank.<<: must name another section"),
        ("? [seed]\n: 5", "?: a key must be a word, not a list or a section"),
        ("seed: !!int x", "seed: has a tag that does not match its value, !!int; remove the tag"),
        ("seed: !!python/name:os.system", "seed: has a tag that does not match its value, !!python/name:os.system; re"),
        ("seed: !!python/object/apply:os.system ['x']", 'seed: must be a whole number, found ["x"]'),  # not executed
    ],
)
def test_unusable_yaml_is_reported_at_its_key(text: str, problem: str) -> None:
    assert any(line.startswith(f"my.yaml:1: {problem}") for line in problems(text)), problems(text)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null", "data:\ntrain:\n", "{}"])
def test_empty_sections_have_their_defaults(text: str) -> None:
    assert parse(text) == Config()


def test_sections_without_kind_have_the_default_kind() -> None:
    assert parse("data: {images: 50}").data == DemoData(images=50)
    assert parse("model: {backbone: {name: resnet18}}").model.backbone == TorchvisionBackbone(name="resnet18")


def test_merge_keys() -> None:
    views = parse("views:\n  weak: &w {crop_scale: [0.5, 1], flip: 0.1}\n  strong: {<<: *w, flip: 0.2}\n").views
    assert (views.strong.crop_scale, views.strong.flip, views.weak.flip) == ((0.5, 1.0), 0.2, 0.1)


def test_problems_of_merged_values_are_reported_where_they_were_written() -> None:
    text = """\
views:
  weak: &weak
    crop_scale: [0.5, 1]
    flip: 3
  strong:
    <<: [*weak, {flip: 4, blur: 5}]
    crop_scale: [0.5, x]
"""
    assert problems(text) == [
        "my.yaml:4: views.weak.flip: must be at most 1.0, found 3",
        "my.yaml:4: views.strong.flip: must be at most 1.0, found 3",
        "my.yaml:6: views.strong.blur: must be at most 1.0, found 5",
        'my.yaml:7: views.strong.crop_scale[1]: must be a number, found "x"',
    ]


@pytest.mark.parametrize("path", ["2024-01-01", "7", "010", "12", "no", "1e3", "true", "null.png"])
def test_text_that_looks_like_another_type_is_text_where_text_is_expected(path: str) -> None:
    assert parse(f"data: {{kind: folder, path: {path}}}").data == FolderData(path=Path(path))


# Overrides


def test_later_overrides_win_and_mappings_replace_sections() -> None:
    config = parse(
        "train:\n  epochs: 7\nknn:\n  images: 5",
        "train.epochs=8",
        "train.epochs=9",
        "views.strong.crop_scale=[0.5, 1.0]",
        "target.final_momentum=1",
        "checkpoint.every_minutes=null",
        "knn={k: 3}",
        "optimizer.learning_rate = 1e-2",
    )
    assert (config.train.epochs, config.knn.k, config.knn.images) == (9, 3, 10_000)
    assert config.views.strong.crop_scale == (0.5, 1.0)
    assert (config.target.final_momentum, config.checkpoint.every_minutes) == (1.0, None)
    assert config.optimizer.learning_rate == 0.01


def test_malformed_overrides_are_reported() -> None:
    usage = "must be KEY=VALUE, such as --set train.epochs=50"
    assert problems("train:\n  epochs: 7\n", "train.epochs.x=1", "=3", "a..b=3") == [
        "--set train.epochs.x=1: train.epochs: is a value, not a section; it has no keys",
        f"--set =3: {usage}",
        f"--set a..b=3: {usage}",
    ]


@pytest.mark.parametrize("text", ["a: b", "[unclosed", "*", "{", "C:\\images", "x=y"])
def test_an_override_that_is_not_yaml_is_text(text: str) -> None:
    assert parse("", "data.kind=folder", f"data.path={text}").data == FolderData(path=Path(text))


def test_changing_the_kind_resets_the_section_except_shared_and_overridden_keys() -> None:
    text = "data: {kind: cifar10, root: elsewhere, download: false, workers: 3}"
    config = parse(text, "data.path=x.parquet", "data.kind=parquet")
    assert config.data == ParquetData(path=Path("x.parquet"), workers=3)
    assert parse(text, "data.kind=cifar10").data == TorchvisionData(
        kind="cifar10", root=Path("elsewhere"), download=False, workers=3
    )
    again = override_config(config, ["data.kind=demo"])
    assert again.data == DemoData(workers=3)
    assert override_config(again, ["seed=5"]) == again.model_copy(update={"seed": 5})


def test_a_key_missing_because_of_an_override_is_reported_at_the_override() -> None:
    text = "data:\n  kind: parquet\n  path: x\n"
    problem = "data.path: is required; add it to the file, or pass --set data.path=…"
    assert problems(text, "data.kind=folder") == [f"--set data.kind=folder: {problem}"]
    assert problems(text, "data={kind: folder}") == [f"--set data={{kind: folder}}: {problem}"]


def test_a_section_and_its_kind_can_be_overridden_in_any_order() -> None:
    text = "data:\n  kind: folder\n  path: x\n  labels: none\n"
    assert parse(text, "data={kind: folder, path: y}").data == FolderData(path=Path("y"))
    assert parse(text, "data={kind: folder, path: y}", "data.kind=parquet").data == ParquetData(path=Path("y"))
    assert parse(text, "data.kind=parquet", "data={kind: folder, path: y}").data == FolderData(path=Path("y"))
