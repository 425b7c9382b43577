import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from msf_faiss.config import Config, FolderData, ParquetData, TrainConfig
from msf_faiss.config.load import config_schema, dump_config, load_config, shipped_configs
from msf_faiss.errors import UserError

SHIPPED = ["cifar10", "cifar10_laptop", "demo", "folder", "imagenet", "imagenet_large", "stl10"]


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_config_finds_files_and_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config() == load_config("demo")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "seed: 3")
    assert load_config("my.yaml").seed == load_config("./my.yaml").seed == 3
    assert load_config("my.yaml", ["seed=5"]).seed == 5
    (tmp_path / "demo.yaml").write_text("seed: 4")
    assert load_config("demo.yaml").seed == 4
    assert load_config("demo").seed == 0


def test_load_config_explains_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9")
    (tmp_path / "binary.yaml").write_bytes(b"\x00\x01")
    for reference, problem in {
        "dmo": r"dmo: no such config; did you mean demo\? give the path",
        "zzz": f"a shipped name: {', '.join(SHIPPED)}",
        tmp_path / "missing.yaml": r"missing\.yaml: no such config; give the path",
        tmp_path: r"cannot be read \(Is a directory\)",
        tmp_path / "latin.yaml": r"latin\.yaml: not UTF-8 text \(at byte 5\)",
        tmp_path / "binary.yaml": "not valid YAML",
    }.items():
        with pytest.raises(UserError, match=problem):
            load_config(reference)


def test_problems_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: -1")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"the config has a problem:\n  {path}:2: train.epochs: must be at least 1, found -1"


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\ntrain: {epochs: 2}\r\n")
    assert load_config(tmp_path / "bom.yaml") == Config(seed=3, train=TrainConfig(epochs=2))


def test_the_home_folder_is_expanded_and_other_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    text = "data: {kind: parquet, path: ~/images, test_path: ../test, cache_dir: ~}"
    data = load_config(write(tmp_path, text)).data
    assert data == ParquetData(path=Path("/home/ada/images"), test_path=Path("../test"), cache_dir=None)
    nobody = load_config(write(tmp_path, "data: {kind: folder, path: ~no-such-user/x}"))
    assert nobody.data == FolderData(path=Path("~no-such-user/x"))


@pytest.mark.parametrize("name", SHIPPED)
def test_dumped_shipped_configs_load_as_equal(tmp_path: Path, name: str) -> None:
    config = load_config(name)
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("number", [1e-4, 1e-5, 1.5e-7, 3e20, 0.1, 1 / 3, 5.0])
@pytest.mark.parametrize("path", ["1e5", "null", "true", "~x", "12", "a: b", "it's", "# x", "ä ö/日本", "x\ny", " x "])
def test_dumped_odd_values_load_as_equal(tmp_path: Path, number: float, path: str) -> None:
    config = Config(data=FolderData(path=Path(path)))
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": number})})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_dump_config_writes_the_kind_of_a_section_first() -> None:
    assert "\ndata:\n  kind: demo\n" in dump_config(Config())


def test_config_schema_describes_every_key() -> None:
    schema = json.loads(json.dumps(config_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
        assert "description" in definition
        for name, field in definition["properties"].items():
            assert name == "kind" or "description" in field or "$ref" in field or "discriminator" in field, name


def test_every_shipped_config_says_what_it_is_for_and_how_to_run_it() -> None:
    assert list(shipped_configs()) == SHIPPED
    assert all(shipped_configs().values())
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert f"msf-faiss pretrain {path.stem}" in header or path.stem == "demo"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_loading_imports_neither_torch_nor_numpy_nor_click() -> None:
    code = "import sys, msf_faiss.config.load as c; c.load_config('demo'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'numpy'", "'click'"} & set(done.stdout.strip("[]\n").split(", "))
