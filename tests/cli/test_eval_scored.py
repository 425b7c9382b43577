"""Evaluations say which images they score, and how much guessing scores."""

import json
from pathlib import Path

import pytest
from invoking import Invoke
from test_eval import write_parquet


def parquet(tmp_path: Path, train: list[int], test: list[int] | None) -> list[str]:
    """The options that evaluate a run on images with these labels; `test` None: held-out images without labels."""
    write_parquet(tmp_path / "train.parquet", train)
    write_parquet(tmp_path / "test.parquet", test)
    settings = ["kind=parquet", f"path={tmp_path / 'train.parquet'}", f"test_path={tmp_path / 'test.parquet'}"]
    settings += [f"cache_dir={tmp_path / 'cache'}", "workers=0"]
    return [word for setting in settings for word in ("--set", f"data.{setting}")]


def test_unlabelled_held_out_images_are_named_as_the_cause(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    options = [*parquet(tmp_path, [0, 1, 2, 0, 1, 2], None), "--out", tmp_path / "results", "--no-keep"]
    done = invoke("eval-knn", tiny_run, "--k", "1", *options)
    assert done.code == 0, done.stderr
    assert "none of the 6 held-out images has a label (for example" in done.stderr
    assert "leave-one-out, because none of the 6 held-out images has a label" in done.stdout
    for command in ("eval-linear", "eval-semi", "eval-transfer"):
        done = invoke(command, tiny_run, *options)
        assert done.code == 2
        assert "but none of the 6 held-out images has a label" in done.stderr
        assert "names none" not in done.stderr


def test_held_out_images_that_are_the_training_images(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    options = [*parquet(tmp_path, [0, 1, 0, 1], [0, 1]), "--set", f"data.test_path={tmp_path / 'train.parquet'}"]
    done = invoke("eval-linear", tiny_run, *options, "--out", tmp_path / "results", "--no-keep")
    assert done.code == 2
    assert "but the config names the training images once more" in done.stderr


@pytest.mark.parametrize(("labels", "shown"), [([0, 9], False), ([0, 1, 2, 3, 9], False), ([0, 1, 2, 3, 4, 9], True)])
@pytest.mark.parametrize("command", ["eval-linear", "eval-semi"])
def test_top5_counts_classes_that_occur(
    invoke: Invoke, tiny_run: Path, tmp_path: Path, command: str, labels: list[int], shown: bool
) -> None:
    options = [*parquet(tmp_path, labels * 3, labels), "--epochs", "1", "--out", tmp_path / "results", "--no-keep"]
    options += ["--labels", "100%"] if command == "eval-semi" else ["--fast"]
    done = invoke(command, tiny_run, *options, "--json")
    assert done.code == 0, done.stderr
    for result in json.loads(done.stdout)["results"]:
        assert any(score["metric"].endswith("top 5") for score in result["scores"]) == shown
        assert result["protocol"]["data"]["classes"] == len(labels)


def test_guessing_the_majority_class_is_visible(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    labels = [0] * 30 + [2] * 3
    options = [*parquet(tmp_path, labels, [*labels, 1]), "--out", tmp_path / "results", "--no-keep"]
    done = invoke("eval-all", tiny_run, *options, "--fast", "--encoder", "online", "--only", "knn", "--only", "linear")
    assert done.code == 0, done.stderr
    assert "2 classes, chance 50.0%, majority class 88.2%" in done.stdout
    assert "held-out images of classes without training images, which count as wrong: 1" in done.stdout
    rows = {line.split("  ")[0]: line.split()[-1] for line in done.stdout.splitlines() if "  " in line}
    assert rows["20-NN"] == "88.2"  # 30 of 34, all of one class
    assert rows["20-NN, mean per class"] == "33.3"  # 1, 0 and 0
    assert "linear (fast), mean per class" in rows
    page = (tmp_path / "results" / "summary.md").read_text()
    assert "chance 50.0%, majority class 88.2%" in page
    assert "\n| 20-NN, mean per class | 33.33" in page
