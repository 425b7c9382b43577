"""Evaluations of files of weights, with cached features, and on several ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from invoking import Invoke
from pool import RankPool

from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.evaluate.feature_cache import FeatureCache
from msf_faiss.evaluate.scoring import score_knn, score_linear
from msf_faiss.evaluate.setup import open_setup

ENCODERS = ("--encoder", "online", "--encoder", "target", "--encoder", "untrained")


@pytest.fixture
def run_dir(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("results", "features"))


def save_like_authors(run_dir: Path, path: Path) -> dict[str, torch.Tensor]:
    """The weights of the run with the authors' names."""
    model = safetensors.torch.load_file(next(run_dir.glob("checkpoints/*/model.safetensors")))
    names = {"online": "encoder_q", "target": "encoder_t", "predictor": "predict_q"}
    state = {}
    for name, tensor in model.items():
        part, _, rest = name.partition(".")
        state[f"module.{names[part]}.{rest.replace('backbone.', '').replace('projector.', 'fc.')}"] = tensor
    torch.save({"state_dict": state, "epoch": 2}, path)
    return state


def scores(done: str) -> list[tuple[str, str, float]]:
    return [
        (result["encoder"], score["metric"], score["correct"])
        for result in json.loads(done)["results"]
        for score in result["scores"]
    ]


def test_authors_checkpoint_scores_like_ours(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    state = save_like_authors(run_dir, tmp_path / "authors.pth")
    config = str(run_dir / "config.yaml")
    for command, options in (("eval-knn", ["--k", "1", "--k", "5"]), ("eval-linear", ["--epochs", "3"])):
        ours = invoke(command, run_dir, *ENCODERS, *options, "--json")
        theirs = invoke(command, tmp_path / "authors.pth", "--config", config, *ENCODERS, *options, "--json")
        assert (ours.code, theirs.code) == (0, 0), theirs.stderr
        assert scores(theirs.stdout) == scores(ours.stdout)
        assert "results will not be saved" in theirs.stderr
    out = tmp_path / "results"
    done = invoke("eval-knn", tmp_path / "authors.pth", "--config", config, "--out", out, "--json")
    assert [result["encoder"] for result in json.loads(done.stdout)["results"]] == ["online"]
    saved = json.loads(next(out.iterdir()).read_text())
    assert (saved["checkpoint"], saved["step"], saved["epoch"]) == (str(tmp_path / "authors.pth"), None, 2.0)
    table = invoke("eval-knn", tmp_path / "authors.pth", "--config", config)
    assert table.code == 0
    assert "online" in table.stdout

    for name in ("module.encoder_q.stem.0.weight", "module.encoder_q.fc.3.bias"):
        torch.save({"state_dict": {key: value for key, value in state.items() if key != name}}, tmp_path / "less.pth")
        done = invoke("eval-knn", tmp_path / "less.pth", "--config", config)
        assert (done.code, done.stdout) == (2, "")
        assert "do not fit the network" in done.stderr
        assert "missing: online." in done.stderr


def test_options_for_files_or_runs_only(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    save_like_authors(run_dir, tmp_path / "authors.pth")
    for arguments, complaint in [
        ([run_dir, "--config", "demo"], "has its own config"),
        ([run_dir, "--arch", "resnet18"], "has its own config"),
        ([tmp_path / "authors.pth"], "is a file of weights, which does not say what data"),
        ([tmp_path / "authors.pth", "--config", "no-such"], "no such config"),
        ([tmp_path / "authors.pth", "--config", "demo", "--arch", "vgg11"], "the MSF authors' code"),
        ([run_dir, "--encoder", "weights"], "has no encoder 'weights', only online and target"),
    ]:
        done = invoke("eval-knn", *arguments)
        assert (done.code, done.stdout) == (2, ""), complaint
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr


def test_features_are_cached(invoke: Invoke, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = invoke("eval-knn", run_dir, *ENCODERS, "--json")
    assert first.code == 0, first.stderr
    files = sorted((run_dir / "features").iterdir())
    assert len(files) == 6  # three encoders, two splits
    assert "online: features of 48 training images" in first.stderr
    again = invoke("eval-knn", run_dir, *ENCODERS, "--json", "--batch-size", "7")
    assert scores(again.stdout) == scores(first.stdout)
    assert "cached features of 48 training images" in again.stderr
    assert "online: features of" not in again.stderr
    linear = invoke("eval-linear", run_dir, "--fast", "--epochs", "2")
    assert "online: cached features of 20 held-out images" in linear.stderr
    assert sorted((run_dir / "features").iterdir()) == files

    few = invoke("eval-knn", run_dir, "--limit", "9", "--json")  # a subset of the cached features
    assert "online: cached features of 9 training images" in few.stderr
    assert sorted((run_dir / "features").iterdir()) == files
    computed = invoke("eval-knn", run_dir, "--limit", "9", "--json", "--no-keep")
    assert "online: features of 9 training images" in computed.stderr
    assert scores(few.stdout) == scores(computed.stdout)

    for options in (["--set", "data.seed=1"], ["--set", "views.size=14"]):
        other = invoke("eval-knn", run_dir, *options)
        assert other.code == 0, other.stderr
        assert "cached features" not in other.stderr, options
    assert len(list((run_dir / "features").iterdir())) == 6 + 4

    cut = next(path for path in files if path.name.startswith("online") and "-train-" in path.name)
    cut.write_bytes(cut.read_bytes()[:-9])  # as after a kill or on a full disk
    recomputed = invoke("eval-knn", run_dir, "--json")
    assert scores(recomputed.stdout) == [score for score in scores(first.stdout) if score[0] == "online"]
    assert "online: features of 48 training images" in recomputed.stderr

    shutil.rmtree(run_dir / "features")
    assert invoke("eval-knn", run_dir, "--no-keep").code == 0
    assert not (run_dir / "features").exists()

    def full(self: FeatureCache, *_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(FeatureCache, "put", full)
    done = invoke("eval-knn", run_dir)
    assert done.code == 0
    assert "features not cached" in done.stderr
    assert "No space left" in done.stderr


def evaluate_with(ranks: Ranks, run_dir: Path) -> list[tuple[str, int | None]]:
    """Scores of one rank alone, then of all of them together."""
    correct = []
    for together in (ALONE, ranks):
        setup = open_setup(run_dir, [], torch.device("cpu"), ranks=together)
        results = [
            score_knn(setup, "online", ks=[1, 5], temperatures=[0.1]),
            score_linear(setup, "online", epochs=2),
            score_linear(setup, "target", epochs=2, fast=True),
        ]
        correct += [(score.metric, score.correct) for result in results for score in result.scores]
    return correct


def test_two_ranks_score_like_one(pool: RankPool, run_dir: Path) -> None:
    first, second = pool.run(2, evaluate_with, run_dir)
    assert first == second
    assert first[: len(first) // 2] == first[len(first) // 2 :]
    assert len(first) == 2 * (5 + 3 + 3)


@pytest.mark.slow
def test_linear_probe_with_torchrun(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "msf_faiss_cli",
    ]
    alone = invoke("eval-linear", run_dir, "--epochs", "2", "--json", "--no-keep", "--out", tmp_path / "alone")
    done = subprocess.run(
        [*command, "eval-linear", str(run_dir), "--epochs", "2", "--json", "--out", str(tmp_path / "both")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert scores(done.stdout) == scores(alone.stdout)
    assert len(list((tmp_path / "both").iterdir())) == 1
    assert done.stderr.count("features of 20 held-out images") == 1
