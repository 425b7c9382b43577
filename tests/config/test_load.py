import json
from pathlib import Path

import pytest
import yaml

from msf_faiss.config import (
    Config,
    DemoData,
    FolderData,
    ParquetData,
    TorchvisionBackbone,
    TorchvisionData,
    TrainConfig,
)
from msf_faiss.config.load import config_schema, dump_config, load_config, override_config, shipped_configs
from msf_faiss.errors import UserError

KINDS = "must be demo, folder, parquet, webdataset, huggingface, cifar10, cifar100 or stl10"


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """Each problem, without the folder."""
    with pytest.raises(UserError) as caught:
        load_config(write(folder, text), overrides)
    heading, *lines = str(caught.value).replace(f"{folder}/", "").split("\n  ")
    assert heading == ("the config has a problem:" if len(lines) == 1 else f"the config has {len(lines)} problems:")
    return lines


def refusal(reference: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_config(reference)
    return str(caught.value)


def test_every_problem_is_told_at_once_with_its_place_and_remedy(tmp_path: Path) -> None:
    text = """\
sead: 1
optimizer:
  learning_rate: fast
  lerning_rate: 1
  schedule: epock
bank:
  capacity: -5
  kind: flat
  kind: flatt
data:
  kind: folder
  pth: images
  workers: many
views:
  weak: {crop_scale: [0.2]}
  strong:
    blur_sigma: [3, 1]
train:
  epochs: 2.5
  batch_size: yes
checkpoint: 5
"""
    assert problems(tmp_path, text, "train.epoch=3", "nonsense") == [
        "my.yaml:1: sead: no such key; did you mean seed?",
        "my.yaml:3: optimizer.learning_rate: must be a number, found 'fast'",
        "my.yaml:4: optimizer.lerning_rate: no such key; did you mean learning_rate?",
        "my.yaml:5: optimizer.schedule: must be epoch, step or constant, found 'epock'; did you mean epoch?",
        "my.yaml:7: bank.capacity: must be at least 1, an amount of memory, as in 8GiB or dataset, found -5",
        "my.yaml:9: bank.kind: stands twice (first in line 8); keep one of them",
        "my.yaml:10: data.path: is required; write it into the file, or add --set data.path=…",
        "my.yaml:12: data.pth: no such key; did you mean path?",
        "my.yaml:13: data.workers: must be a whole number or auto, found 'many'",
        "my.yaml:15: views.weak.crop_scale[1]: is missing; the list needs more entries",
        "my.yaml:17: views.strong.blur_sigma: the first must not be above the second, found [3.0, 1.0]",
        "my.yaml:19: train.epochs: must be a whole number, found 2.5",
        "my.yaml:20: train.batch_size: must be a whole number, found 'yes'",
        "my.yaml:21: checkpoint: must be a section with keys of its own, found 5",
        "--set train.epoch=3: train.epoch: no such key; did you mean epochs?",
        "--set nonsense: must be KEY=VALUE, as in --set train.epochs=50",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "data: {kind: parket}",
            f"my.yaml:1: data.kind: {KINDS}, found",
        ),
        ("train:\n  epochs: true", "my.yaml:2: train.epochs: must be a whole number, found true"),
        ("target: {momentum: true}", "my.yaml:1: target.momentum: must be a number, found true"),
        ("views: {mean: [1, 0, no]}", "my.yaml:1: views.mean[2]: must be a number, found 'no'"),
        ("train: {epochs: [1]}", "my.yaml:1: train.epochs: must be a whole number, found [1]"),
        ("optimizer: {learning_rate: .nan}", "my.yaml:1: optimizer.learning_rate: must be a finite number, found nan"),
        ("target:\n  momentum: 1.5", "my.yaml:2: target.momentum: must be at most 1.0, found 1.5"),
        ("data: {kind: cifar10, download: maybe}", "my.yaml:1: data.download: must be true or false, found 'maybe'"),
        ("bank:\n  capacity: 3\n  k: 4", "my.yaml:3: bank.k: must be at most capacity (3), found 4"),
        ("views:\n  size: 64\n  eval_resize: 32", "my.yaml:3: views.eval_resize: must be at least size (64)"),
        (
            "model:\n  backbone:\n    kind: narrow\n    depths: [1]",
            "my.yaml:4: model.backbone.strides: must be as many as depths",
        ),
        (
            "views: {mean: [0.5, 0.5, 0.5, 0.5]}",
            "my.yaml:1: views.mean: must be a list of 3, found [0.5, 0.5, 0.5, 0.5]",
        ),
        ("views: {mean: [0.5, x, 0.5]}", "my.yaml:1: views.mean[1]: must be a number, found 'x'"),
        ("knn:\n  colour: 1", "my.yaml:2: knn.colour: no such key; the keys here are every_epochs, k, images"),
        ("a: &a {b: *a}", "my.yaml:1: a.b: refers to itself; write the values out"),
        ("seed: '5'", "my.yaml:1: seed: must be a whole number, found '5'; write it without quotes or leading zeros"),
        ("train: {epochs: 010}", "my.yaml:1: train.epochs: must be a whole number, found '010'; write it without"),
        ("train.epochs: 3", "my.yaml:1: train.epochs: no such key; write epochs inside the section train"),
        ("views: {bank: 3}", "my.yaml:1: views.bank: no such key; bank is a section of its own, at the top level"),
        (
            "data: {path: x}",
            "my.yaml:1: data.path: no such key for kind demo, but for folder, parquet, webdataset or hugg",
        ),
        ("data: [1]", "my.yaml:1: data: must be a section with keys of its own, found [1]"),
        (
            "data: {kind: [a]}",
            f"my.yaml:1: data.kind: {KINDS}, found ['a']",
        ),
        (
            "data: {kind: null}",
            f"my.yaml:1: data.kind: {KINDS}, found nothing",
        ),
        ("bank: {<<: 5}", "my.yaml:1: bank.<<: must name another section"),
        ("bank: &b {<<: *b}", "my.yaml:1: bank.<<: must name another section"),
        ("seed: !!int x", "my.yaml:1: seed: has the tag !!int, which does not fit; remove the tag"),
        ("? [seed]\n: 5", "my.yaml:1: ?: a key must be a word, found a list or a section"),
        ("'': 5", "my.yaml:1: '': no such key"),
        ("true: 5", "my.yaml:1: true: no such key"),
    ],
)
def test_one_problem(tmp_path: Path, text: str, problem: str) -> None:
    assert any(line.startswith(problem) for line in problems(tmp_path, text)), problems(tmp_path, text)


def test_rules_between_keys_are_told_together_with_wrong_keys(tmp_path: Path) -> None:
    text = """\
data: {kind: foldr, pth: images}
bank:
  dtype: flaot16
  capacity: 3
optimizer:
  warmup_epochs: 9
  learning_rate: fast
train:
  epochs: 9
  steps: 3
"""
    assert problems(tmp_path, text, "bank.k=4") == [
        "my.yaml:1: data.pth: no such key; did you mean path?",
        f"my.yaml:1: data.kind: {KINDS}, found 'foldr'; did you mean folder?",
        "my.yaml:3: bank.dtype: must be float32, float16 or bfloat16, found 'flaot16'; did you mean float16?",
        "my.yaml:6: optimizer.warmup_epochs: must be below train.epochs (9) unless optimizer.schedule is constant, "
        "found 9.0",
        "my.yaml:7: optimizer.learning_rate: must be a number, found 'fast'",
        "my.yaml:10: train.steps: no such key; did you mean max_steps?",
        "--set bank.k=4: bank.k: must be at most capacity (3), found 4",
    ]


def test_a_rule_is_left_alone_where_a_wrong_key_has_a_part_in_it(tmp_path: Path) -> None:
    assert problems(tmp_path, "bank: {capacity: 3, k: ten}\n") == [
        "my.yaml:1: bank.k: must be a whole number, found 'ten'",
    ]
    assert problems(tmp_path, "bank: {capacity: 3}\noptimizer: {warmup_epochs: 3}\ntrain: {epochs: -2}") == [
        "my.yaml:1: bank.k: must be at most capacity (3), found 5",
        "my.yaml:3: train.epochs: must be at least 1, found -2",
    ]


def test_texts_that_are_no_config(tmp_path: Path) -> None:
    assert "my.yaml:1: must hold sections and keys" in refusal(write(tmp_path, "just words"))
    assert "my.yaml:2: not valid YAML" in refusal(write(tmp_path, "train:\n\tepochs: 3"))
    assert "not valid YAML" in refusal(write(tmp_path, "train: [1"))
    assert "not valid YAML" in refusal(write(tmp_path, "a: 1\n---\nb: 2"))
    assert "my.yaml:1: not valid YAML: found undefined alias 'b'" in refusal(write(tmp_path, "a: *b"))
    assert "my.yaml:2: not valid YAML: a control character" in refusal(write(tmp_path, "seed: 1\n# \x07"))
    assert "cannot be read" in refusal(tmp_path)
    assert "no such config; give the path" in refusal(tmp_path / "missing.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\ntrain: {epochs: 2}\r\n")
    assert load_config(tmp_path / "bom.yaml") == Config(seed=3, train=TrainConfig(epochs=2))
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9")
    assert "not UTF-8 text (at byte 5)" in refusal(tmp_path / "latin.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\x00\x01")
    assert "not valid YAML" in refusal(tmp_path / "binary.yaml")


def test_nothing_from_a_file_is_executed(tmp_path: Path) -> None:
    text = "seed: !!python/object/apply:os.system ['touch executed']"
    assert problems(tmp_path, text) == ["my.yaml:1: seed: must be a whole number, found ['touch executed']"]
    assert problems(tmp_path, "seed: !!python/name:os.system")[0].startswith(
        "my.yaml:1: seed: has the tag !!python/name"
    )


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(shipped_configs()) == {"cifar10", "demo", "folder", "imagenet", "imagenet_large", "stl10"}
    assert load_config() == load_config("demo")
    assert "did you mean demo?" in refusal("dmo")
    assert "cifar10, demo, folder, imagenet, imagenet_large, stl10" in refusal("zzz")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "seed: 3")
    assert load_config("my.yaml").seed == load_config("./my.yaml").seed == 3
    (tmp_path / "demo.yaml").write_text("seed: 4")
    assert load_config("demo.yaml").seed == 4
    assert load_config("demo").seed == 0


def test_numbers_and_words_are_what_people_mean(tmp_path: Path) -> None:
    text = """
seed: 1_000
optimizer: {learning_rate: 1e-3, weight_decay: 5E-4, momentum: .5}
bank: {capacity: 1e3}
data: {kind: folder, path: 2024-01-01, test_path: "7"}
train: {threads: ~, max_steps: null}
"""
    config = load_config(write(tmp_path, text))
    assert (config.seed, config.optimizer.learning_rate, config.optimizer.weight_decay) == (1000, 1e-3, 5e-4)
    assert (config.optimizer.momentum, config.bank.capacity) == (0.5, 1000)
    assert config.data == FolderData(path=Path("2024-01-01"), test_path=Path("7"))
    assert config.train.threads is None
    assert load_config(write(tmp_path, "data: {kind: folder, path: 010}")).data == FolderData(path=Path("010"))
    assert load_config(write(tmp_path, "data: {kind: folder, path: 12}")).data == FolderData(path=Path("12"))
    assert load_config(write(tmp_path, "data: {kind: folder, path: no}")).data == FolderData(path=Path("no"))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null", "data:\ntrain:\n", "{}"])
def test_what_is_left_empty_has_its_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)) == Config()


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "base: &b\n  crop_scale: [0.5, 1]\n"
    assert problems(tmp_path, text)[0].startswith("my.yaml:1: base: no such key")
    merged = "views:\n  weak: &w {crop_scale: [0.5, 1], flip: 0.1}\n  strong: {<<: *w, flip: 0.2}\n"
    config = load_config(write(tmp_path, merged))
    assert (config.views.strong.crop_scale, config.views.strong.flip, config.views.weak.flip) == ((0.5, 1.0), 0.2, 0.1)


def test_what_a_merge_brings_is_reported_where_it_stands(tmp_path: Path) -> None:
    text = """\
views:
  weak: &weak
    crop_scale: [0.5, 1]
    flip: 3
  strong:
    <<: [*weak, {flip: 4, blur: 5}]
    crop_scale: [0.5, x]
"""
    assert problems(tmp_path, text) == [
        "my.yaml:4: views.weak.flip: must be at most 1.0, found 3",
        "my.yaml:4: views.strong.flip: must be at most 1.0, found 3",
        "my.yaml:6: views.strong.blur: must be at most 1.0, found 5",
        "my.yaml:7: views.strong.crop_scale[1]: must be a number, found 'x'",
    ]


def test_home_is_expanded_and_other_paths_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    text = "data: {kind: parquet, path: ~/images, test_path: ../test, cache_dir: ~}"
    data = load_config(write(tmp_path, text)).data
    assert data == ParquetData(path=Path("/home/ada/images"), test_path=Path("../test"), cache_dir=None)
    nobody = load_config(write(tmp_path, "data: {kind: folder, path: ~no-such-user/x}"))
    assert nobody.data == FolderData(path=Path("~no-such-user/x"))


def test_a_missing_key_of_a_new_kind_is_reported_at_the_override(tmp_path: Path) -> None:
    text = "data:\n  kind: parquet\n  path: x\n  workers: 2\n"
    assert problems(tmp_path, text, "data.kind=folder") == [
        "--set data.kind=folder: data.path: is required; write it into the file, or add --set data.path=…"
    ]


def test_a_whole_section_set_by_an_override_forgets_the_file(tmp_path: Path) -> None:
    text = "data:\n  kind: folder\n  path: x\n  labels: none\n"
    assert problems(tmp_path, text, "data={kind: folder}") == [
        "--set data={kind: folder}: data.path: is required; write it into the file, or add --set data.path=…"
    ]
    path = write(tmp_path, text)
    assert load_config(path, ["data={kind: folder, path: y}"]).data == FolderData(path=Path("y"))
    assert load_config(path, ["data={kind: folder, path: y}", "data.kind=parquet"]).data == ParquetData(path=Path("y"))
    assert load_config(path, ["data.kind=parquet", "data={kind: folder, path: y}"]).data == FolderData(path=Path("y"))


def test_the_kind_of_a_section_is_written_first() -> None:
    assert "\ndata:\n  kind: demo\n" in dump_config(Config())


def test_a_section_without_its_kind_has_the_default_one(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "data: {images: 50}")).data == DemoData(images=50)
    config = load_config(write(tmp_path, "model: {backbone: {name: resnet18}}"))
    assert config.model.backbone == TorchvisionBackbone(name="resnet18")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: 7\n")
    config = load_config(
        path,
        [
            "train.epochs=8",
            "train.epochs=9",
            "views.strong.crop_scale=[0.5, 1.0]",
            "target.final_momentum=1",
            "checkpoint.keep_every_epochs=null",
            "knn={k: 3}",
            "optimizer.learning_rate = 1e-2",
        ],
    )
    assert (config.train.epochs, config.knn.k, config.knn.images) == (9, 3, 10_000)
    assert config.views.strong.crop_scale == (0.5, 1.0)
    assert (config.target.final_momentum, config.checkpoint.keep_every_epochs) == (1.0, None)


def test_overrides_that_cannot_be(tmp_path: Path) -> None:
    usage = "must be KEY=VALUE, as in --set train.epochs=50"
    assert problems(tmp_path, "train:\n  epochs: 7\n", "train.epochs.x=1", "=3", "a..b=3", "bank.capacity=") == [
        "--set train.epochs.x=1: train.epochs: holds a value; there are no keys below it",
        f"--set =3: {usage}",
        f"--set a..b=3: {usage}",
        "--set bank.capacity=: bank.capacity: must be a whole number, an amount of memory, as in 8GiB or dataset, "
        "found nothing",
    ]


def test_another_kind_starts_its_section_afresh(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {kind: cifar10, root: elsewhere, download: false, workers: 3}")
    config = load_config(path, ["data.path=x.parquet", "data.kind=parquet"])
    assert config.data == ParquetData(path=Path("x.parquet"), workers=3)
    assert load_config(path, ["data.kind=cifar10"]).data == TorchvisionData(
        kind="cifar10", root=Path("elsewhere"), download=False, workers=3
    )
    again = override_config(config, ["data.kind=demo"])
    assert again.data == DemoData(workers=3)
    assert override_config(again, ["seed=5"]) == again.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match=r"--set data.kind=folder: data.path: is required"):
        override_config(config, ["data.kind=folder"])


@pytest.mark.parametrize("text", ["a: b", "[unclosed", "*", "{", "C:\\images", "x=y", "1e3", "null.png", "true"])
def test_a_path_may_look_like_other_things(tmp_path: Path, text: str) -> None:
    config = load_config(write(tmp_path, ""), ["data.kind=folder", f"data.path={text}"])
    assert config.data == FolderData(path=Path(text))


@pytest.mark.parametrize("name", ["cifar10", "demo", "folder", "imagenet", "imagenet_large", "stl10"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    config = load_config(name)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert shipped_configs()[name]


@pytest.mark.parametrize("number", [1e-4, 1e-5, 1.5e-7, 3e20, 0.1, 1 / 3, 5.0])
@pytest.mark.parametrize("path", ["1e5", "null", "true", "~x", "12", "a: b", "it's", "# x", "ä ö/日本", "x\ny", " x "])
def test_odd_values_survive_being_written(tmp_path: Path, number: float, path: str) -> None:
    config = Config(data=FolderData(path=Path(path)))
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": number})})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_the_schema_is_one_for_editors() -> None:
    schema = json.loads(json.dumps(config_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
        assert "description" in definition
        for name, field in definition["properties"].items():
            assert name == "kind" or "description" in field or "$ref" in field or "discriminator" in field, name


def test_every_shipped_config_says_how_to_run_it() -> None:
    folder = Path(__file__).parents[2] / "configs"
    for path in folder.glob("*.yaml"):
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert f"msf-faiss pretrain {path.stem}" in header or path.stem == "demo"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
