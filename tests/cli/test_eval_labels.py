"""`eval-semi`, `eval-transfer` and `eval-all`, run in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from invoking import Invoke
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError


@pytest.fixture
def run_dir(tiny_run: Path, tmp_path: Path) -> Path:
    """48 training images, 20 held-out images, six steps."""
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("results", "features"))


def results(text: str) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(text)["results"]
    return parsed


def read_cache(run_dir: Path, encoder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Cached features and their labels."""
    (path,) = (run_dir / "features").glob(f"{encoder}*-{split}-*.safetensors")
    cached = safetensors.torch.load_file(path)
    source = open_source(find_checkpoint(run_dir).config.data, "train" if split == "train" else "test")
    assert source is not None
    assert source.labels is not None
    return cached["embeddings"].double().numpy(), source.labels[cached["ids"].numpy()]


def test_logistic_regression_and_knn_equal_scikit_learn(invoke: Invoke, run_dir: Path) -> None:
    done = invoke("eval-transfer", run_dir, "--json")
    assert done.code == 0, done.stderr
    (result,) = results(done.stdout)
    assert [score["metric"] for score in result["scores"]] == ["logistic", "logistic, mean per class"]
    assert len(result["protocol"]["penalty"]["grid"]) == 45
    (x, y), (tested, wanted) = read_cache(run_dir, "online", "train"), read_cache(run_dir, "online", "test")
    c = result["scores"][0]["settings"]["c"]
    independent = make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x, y)
    assert result["scores"][0]["correct"] == int((independent.predict(tested) == wanted).sum())
    right = independent.predict(tested) == wanted
    means = [right[wanted == label].mean() for label in np.unique(wanted)]
    assert result["scores"][1]["accuracy"] == pytest.approx(np.mean(means))

    done = invoke("eval-knn", run_dir, "--k", "1", "--k", "5", "--k", "20", "--json")
    near = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(x)
    distances, rows = near.kneighbors(tested)
    for score in results(done.stdout)[0]["scores"]:
        if score["correct"] is None:  # a mean per class
            continue
        k, temperature = score["settings"]["k"], score["settings"]["temperature"]
        right = 0
        for far, voters, label in zip(1 - distances[:, :k], y[rows[:, :k]], wanted, strict=True):
            votes: dict[int, tuple[float, float]] = {}
            for similarity, voter in zip(far, voters, strict=True):
                count, total = votes.get(voter, (0.0, 0.0))
                weight = 1.0 if temperature is None else np.exp(similarity / temperature)
                votes[voter] = (count + weight, total + similarity)
            right += max(votes, key=lambda voter: votes[voter]) == label
        assert score["correct"] == right, score["metric"]


def test_transfer_with_mean_per_class(invoke: Invoke, run_dir: Path) -> None:
    done = invoke("eval-transfer", run_dir, "--metric", "mean-per-class", "--fast", "--encoder", "untrained", "--json")
    (result,) = results(done.stdout)
    assert [score["settings"]["mean"] for score in result["scores"]] == ["classes", "images"]
    assert len(result["protocol"]["penalty"]["grid"]) == 12
    assert (result["evaluation"], result["encoder"], result["scores"][0]["correct"]) == ("transfer", "untrained", None)
    assert "logistic, mean per class" in invoke("results", run_dir).stdout


def test_semi_supervised_evaluation(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    done = invoke("eval-semi", run_dir, "--labels", "25%", "--epochs", "2", "--json")
    assert done.code == 0, done.stderr
    linear, tuned = results(done.stdout)
    assert (linear["evaluation"], tuned["evaluation"]) == ("semi-linear", "semi-fine-tune")
    assert linear["scores"][0]["metric"] == "linear, 25 % of labels, 2 epochs"
    assert tuned["scores"][0]["metric"] == "fine-tune, 25 % of labels, 2 epochs"
    for result in (linear, tuned):
        assert result["protocol"]["labels"]["fraction"] == 0.25
        assert result["protocol"]["data"]["training_images"] == 48
        assert result["scores"][0]["settings"]["labels"] == 10  # round(48 / 4 / 10) of each of ten classes
    again = results(invoke("eval-semi", run_dir, "--labels", "0.25", "--epochs", "2", "--json").stdout)
    assert [each["scores"] for each in again] == [linear["scores"], tuned["scores"]]
    assert len(list((run_dir / "results").iterdir())) == 2

    (tmp_path / "some.txt").write_text("# ids\n0\n1\n2\n7\n9\n")
    listed = invoke("eval-semi", run_dir, "--subset", tmp_path / "some.txt", "--mode", "linear", "--fast", "--json")
    (result,) = results(listed.stdout)
    assert result["scores"][0]["metric"] == "linear (fast), 5 labels"
    assert result["protocol"]["labels"]["file"] == "some.txt"
    for arguments, complaint in [
        (["--labels", "0"], "not above 0"),
        (["--labels", "half"], "not a fraction of the labels"),
        (["--subset", tmp_path / "none.txt"], "none.txt"),
    ]:
        done = invoke("eval-semi", run_dir, *arguments)
        assert (done.code, done.stdout) == (2, ""), complaint
        assert complaint in done.stderr


def test_eval_all(invoke: Invoke, run_dir: Path) -> None:
    done = invoke("eval-all", run_dir, "--fast", "--json")
    assert done.code == 0, done.stderr
    done_evaluations = [(result["encoder"], result["evaluation"]) for result in results(done.stdout)]
    suite = ["knn", "linear-fast", "semi-linear", "semi-linear", "transfer"]
    assert done_evaluations == [
        *(("online", name) for name in suite),
        ("target", "knn"),
        *(("untrained", name) for name in suite),
        ("pixels", "knn"),
    ]
    page = (run_dir / "results" / "summary.md").read_text()
    assert "| | trained | target encoder | untrained | raw pixels | gain |" in page
    for metric in (
        "20-NN",
        "linear (fast)",
        "linear (fast), 1 % of labels",
        "linear (fast), 10 % of labels",
        "logistic",
    ):
        assert f"\n| {metric} |" in page
    assert json.loads((run_dir / "results" / "summary.json").read_text())["format"] == "msf-faiss summary"
    assert f"saved {run_dir / 'results' / 'summary.md'}" in done.stderr
    assert "fine-tune" not in page
    table = invoke("results", run_dir)
    assert table.code == 0, table.stderr
    assert table.stdout.count("accuracy in %") == 1


def test_evaluations_without_held_out_images_are_skipped(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    from test_eval import write_parquet

    write_parquet(tmp_path / "other.parquet", [0, 1, 2, -1, 0, 1, 2, 0, 1, 2])
    other = ["--set", "data.kind=parquet", "--set", f"data.path={tmp_path / 'other.parquet'}"]
    other += ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--set", "data.workers=0"]
    done = invoke("eval-all", run_dir, *other, "--json")
    assert done.code == 0, done.stderr
    assert {result["evaluation"] for result in results(done.stdout)} == {"knn"}
    assert "online: skipping linear, semi, transfer, which need held-out images" in done.stderr
    for command in ("eval-semi", "eval-transfer"):
        done = invoke(command, run_dir, *other)
        assert done.code == 2
        assert "needs labelled held-out images, and the config names none; set data.test_path" in done.stderr


def test_unlabelled_held_out_images_are_not_used(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    from test_eval import write_parquet

    write_parquet(tmp_path / "train.parquet", [0, 1, 2, 0, 1, 2])
    write_parquet(tmp_path / "test.parquet", None)
    other = ["--set", "data.kind=parquet", "--set", f"data.path={tmp_path / 'train.parquet'}"]
    other += ["--set", f"data.test_path={tmp_path / 'test.parquet'}", "--set", f"data.cache_dir={tmp_path / 'cache'}"]
    done = invoke("eval-all", run_dir, *other, "--set", "data.workers=0", "--encoder", "online", "--json")
    assert done.code == 0, done.stderr
    assert [result["protocol"]["leave_one_out"] for result in results(done.stdout)] == [True]


def test_results_before_an_error_are_summarized(invoke: Invoke, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise UserError("fine-tuning diverged")

    monkeypatch.setattr("msf_faiss.evaluate.suite.score_semi", diverge)
    done = invoke("eval-all", run_dir, "--fast", "--encoder", "online")
    assert (done.code, done.stdout) == (2, "")
    assert "fine-tuning diverged" in done.stderr
    page = (run_dir / "results" / "summary.md").read_text()
    assert "\n| linear (fast) |" in page
    assert "logistic" not in page


def test_table_of_several_evaluations(invoke: Invoke, run_dir: Path) -> None:
    done = invoke("eval-all", run_dir, "--fast", "--only", "knn", "--only", "transfer")
    assert done.code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["trained", "target", "encoder", "untrained", "raw", "pixels", "gain"] in lines
    assert [line[0] for line in lines if line and line[0] in ("1-NN", "logistic")] == ["1-NN", "logistic"]
    assert done.stdout.startswith(f"{run_dir}, step 6")
