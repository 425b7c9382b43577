import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import Result, Score, load_results, prepare_folder, save_result

RESULT = Result(
    evaluation="knn",
    encoder="online",
    checkpoint="checkpoints/step-00000012",
    weights="1a2b",
    step=12,
    epoch=3.0,
    scores=(Score(metric="20-NN", accuracy=0.5, correct=10, images=20, settings={"k": 20, "temperature": None}),),
    protocol={"data": {"config": {"kind": "demo"}}, "k": [20], "temperatures": [0.07], "limit": None},
    created="2026-01-02T03:04:05+00:00",
    device="cpu",
    seconds=1.5,
    versions={"torch": "2"},
)


def test_saved_result_loads(tmp_path: Path) -> None:
    path = save_result(RESULT, tmp_path)
    assert path.name.startswith("knn-online-step-00000012-")
    assert load_results(tmp_path) == [RESULT]
    saved = json.loads(path.read_text())
    assert (saved["format"], saved["version"]) == ("msf-faiss result", 1)
    assert saved == json.loads(json.dumps(RESULT.to_json()))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary files


def test_result_replaces_one_with_the_same_identity(tmp_path: Path) -> None:
    save_result(RESULT, tmp_path)
    later = replace(RESULT, created="2027-01-01T00:00:00+00:00", seconds=9.0, device="cuda", versions={"torch": "3"})
    save_result(later, tmp_path)
    assert load_results(tmp_path) == [later]
    others = [
        replace(RESULT, weights="3c4d"),
        replace(RESULT, encoder="target"),
        replace(RESULT, encoder="untrained", checkpoint=None, weights=None, step=0),
        replace(RESULT, encoder="pixels", checkpoint=None, weights=None, step=None, epoch=None),
        replace(RESULT, evaluation="linear"),
        replace(RESULT, evaluation="linear-fast"),
        replace(RESULT, protocol={**RESULT.protocol, "k": [1, 20]}),
        replace(RESULT, protocol={**RESULT.protocol, "temperatures": [0.1]}),
        replace(RESULT, protocol={**RESULT.protocol, "limit": 100}),
        replace(RESULT, protocol={**RESULT.protocol, "data": {"config": {"kind": "parquet"}}}),
    ]
    assert len({save_result(other, tmp_path) for other in others}) == len(others)
    assert len(load_results(tmp_path)) == 1 + len(others)


def test_load_results_oldest_first(tmp_path: Path) -> None:
    for step, year in ((1, 2028), (2, 2026), (3, 2027)):
        save_result(replace(RESULT, weights=str(step), step=step, created=f"{year}-01-01T00:00:00+00:00"), tmp_path)
    assert [result.step for result in load_results(tmp_path)] == [2, 3, 1]
    assert load_results(tmp_path / "none") == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"format": "another"}', '{"format": "msf-faiss result", "version": 2}', b"\xff\xfe"],
)
def test_file_that_is_not_a_result_is_named(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "odd.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        UserError, match=r"odd\.json: not a result of this version of msf-faiss \(.+\); move it elsewhere"
    ):
        load_results(tmp_path)


def test_wrong_field_is_named(tmp_path: Path) -> None:
    path = save_result(RESULT, tmp_path)
    path.write_text(path.read_text().replace('"correct": 10', '"correct": "many"'))
    with pytest.raises(UserError, match=r"scores\.0\.correct"):
        load_results(tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    prepare_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/results: cannot create the folder.*another with --out"):
        prepare_folder(tmp_path / "file" / "results")
    with pytest.raises(UserError, match=r"cannot write the result: .*another folder with --out"):
        save_result(RESULT, tmp_path / "file")


def test_comparison_does_not_import_torch() -> None:
    code = "import sys, msf_faiss.evaluate.comparison; print(sorted({'torch', 'faiss'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
