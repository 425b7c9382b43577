import json
from pathlib import Path

import pytest
from test_comparison import knn, probe, result

from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import Result, load_results, save_result
from msf_faiss.evaluate.summary import summary_markdown, write_summary

RESULTS = [
    result("online", knn(20, 0.5234), knn(1, 0.5), step=12),
    result("untrained", knn(20, 0.26), knn(1, 0.25), step=0),
    result("online", probe(0.61), step=12, evaluation="linear"),
    result("online", knn(20, 0.55), step=24),
]


def test_one_table_per_checkpoint_with_protocols() -> None:
    page = summary_markdown(RESULTS, "runs/first")
    lines = page.splitlines()
    assert lines[0] == "# Results of runs/first"
    assert [line for line in lines if line.startswith("## ")] == [
        "## checkpoints/step (epoch 1.2)",
        "## checkpoints/step (epoch 2.4)",
    ]
    table = lines[lines.index("| | trained | untrained | gain |") :]
    assert table[1] == "|---|---:|---:|---:|"
    assert table[2] == "| 1-NN | 50.00 [1] | 25.00 [1] | +25.00 |"
    assert table[3] == "| 20-NN | 52.34 [1] | 26.00 [1] | +26.34 |"
    assert table[4].startswith("| linear | 61.00 [")
    assert "training\\_images" not in page  # nothing is escaped in a code block
    assert page.count("training_images: 4000") == page.count("<details>")


def test_names_are_escaped() -> None:
    page = summary_markdown(RESULTS, "a|b<script>`*\n# x")
    assert page.splitlines()[0] == r"# Results of a\|b\<script\>\`\* \# x"


def test_write_summary(tmp_path: Path) -> None:
    for each in RESULTS:
        save_result(each, tmp_path)
    page = write_summary(tmp_path, "run")
    assert page == tmp_path / "summary.md"
    first = page.read_text()
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["comparisons"][0]["accuracies"]["20-NN"] == {"online": 0.5234, "untrained": 0.26}
    assert len(written["results"]) == len(RESULTS) == len(load_results(tmp_path))
    write_summary(tmp_path, "run")  # summary.json is not taken for a result
    assert page.read_text() == first
    page.unlink()
    page.mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_summary(tmp_path, "run")


def test_summary_without_results() -> None:
    nothing: list[Result] = []
    assert summary_markdown(nothing, "run").startswith("# Results of run\n")
