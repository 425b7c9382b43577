"""`eval-knn`, `eval-linear` and `results`, run in this process."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from invoking import Invoke
from PIL import Image

from msf_faiss.checkpoint import format as checkpoint
from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.data.sources.open import open_source
from msf_faiss.evaluate.knn import evaluate_knn
from msf_faiss.models import build_model


@pytest.fixture
def run_dir(tiny_run: Path, tmp_path: Path) -> Path:
    """48 training images, 20 held-out images, six steps."""
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("results"))


def write_parquet(path: Path, labels: list[int] | None) -> None:
    random = np.random.default_rng(len(labels or []))
    rows = []
    for _ in labels or range(6):
        file = io.BytesIO()
        Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    images = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images} | ({} if labels is None else {"label": pa.array(labels)})), path)


def accuracies(results: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(result["encoder"], score["metric"]): score["accuracy"] for result in results for score in result["scores"]}


def test_knn_of_all_encoders(invoke: Invoke, run_dir: Path) -> None:
    every = [argument for name in ("online", "target", "untrained", "pixels") for argument in ("--encoder", name)]
    done = invoke("eval-knn", run_dir, *every, "--json")
    assert done.code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [result["encoder"] for result in results] == ["online", "target", "untrained", "pixels"]
    assert [(result["checkpoint"], result["step"]) for result in results] == [
        ("checkpoints/step-00000006", 6),
        ("checkpoints/step-00000006", 6),
        (None, 0),
        (None, None),
    ]
    found = accuracies(results)
    assert [metric for encoder, metric in found if encoder == "pixels"] == [
        *("1-NN", "1-NN, mean per class"),
        *("20-NN", "20-NN, mean per class", "20-NN, T 0.07", "20-NN, T 0.1"),
        *("48-NN", "48-NN, mean per class", "48-NN, T 0.07", "48-NN, T 0.1"),
    ]
    # training monitored the same weights
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert found["online", "20-NN"] == [line["knn_accuracy"] for line in lines if "knn_accuracy" in line][-1]
    checkpoint = find_checkpoint(run_dir)
    train, test = (open_source(checkpoint.config.data, split) for split in ("train", "test"))  # type: ignore[arg-type]
    assert train is not None
    fresh = build_model(checkpoint.config.model, seed=checkpoint.config.seed).online.backbone
    device = torch.device("cpu")
    untrained = evaluate_knn(fresh, train, test, config=checkpoint.config, device=device, k=20)
    assert found["untrained", "20-NN"] == untrained.accuracy
    protocol = results[0]["protocol"]
    assert protocol["data"]["config"]["kind"] == "demo"
    assert (protocol["data"]["training_images"], protocol["data"]["held_out_images"]) == (48, 20)
    assert (protocol["k"], protocol["clamped_k"], protocol["leave_one_out"]) == ([1, 20, 200], {"200": 48}, False)
    saved = [json.loads(path.read_text()) for path in (run_dir / "results").iterdir()]
    assert sorted(saved, key=str) == sorted(results, key=str)


def test_results_are_replaced_only_by_the_same_evaluation(invoke: Invoke, run_dir: Path) -> None:
    def files() -> set[str]:
        return {path.name for path in (run_dir / "results").iterdir()}

    assert invoke("eval-knn", run_dir, "--k", "3").code == 0
    first = files()
    assert invoke("eval-knn", run_dir / "checkpoints" / "step-00000006", "--k", "3", "--batch-size", "7").code == 0
    assert files() == first
    for options in (["--k", "4"], ["--limit", "9"], ["--temperature", "1"], ["--set", "data.seed=1"]):
        before = files()
        assert invoke("eval-knn", run_dir, "--k", "3", *options).code == 0
        assert len(files() - before) == 1
    assert before - files() == set()


def test_knn_table(invoke: Invoke, run_dir: Path) -> None:
    done = invoke("eval-knn", run_dir, "--encoder", "online", "--encoder", "untrained", "--k", "1", "--k", "500")
    assert done.code == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0].startswith("accuracy in %, demo: 20 held-out images, 48 training images; 10 classes")
    assert lines[1] == "k = 500 is larger than the number of voters: all 48 vote"
    assert any(line.split() == ["online", "(step", "6)", "untrained"] for line in lines)
    assert [line.partition("  ")[0] for line in lines[-6:]] == [
        *("1-NN", "1-NN, mean per class", "48-NN", "48-NN, mean per class", "48-NN, T 0.07", "48-NN, T 0.1")
    ]
    assert "features of 48 training images" in done.stderr
    assert f"saved {run_dir / 'results' / 'knn-online-step-00000006-'}" in done.stderr


def test_other_data_without_held_out_images(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "other.parquet", [0, 1, 2, -1, 0, 1, 2, 0, 1, 2])
    other = ["--set", "data.kind=parquet", "--set", f"data.path={tmp_path / 'other.parquet'}"]
    other += ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--set", "data.workers=0"]
    done = invoke("eval-knn", run_dir, *other, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)["results"][0]
    assert result["protocol"]["leave_one_out"]
    assert [score["images"] for score in result["scores"]] == [9] * len(result["scores"])
    assert result["protocol"]["clamped_k"] == {"20": 8, "200": 8}
    assert result["protocol"]["data"]["left_out"] == {"train": {"unlabelled": 1, "unreadable": 0}}
    table = invoke("eval-knn", run_dir, *other, "--k", "1").stdout
    assert "other.parquet: 9 training images, leave-one-out; 3 classes" in table
    assert "skipped 1 unlabelled training images" in table
    done = invoke("eval-linear", run_dir, *other)
    assert done.code == 2
    assert "needs labelled held-out images, and the config names none; set data.test_path" in done.stderr
    same = invoke("eval-linear", run_dir, *other, "--set", f"data.test_path={tmp_path / 'other.parquet'}")
    assert same.code == 2


def test_unlabelled_data_are_refused(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "plain.parquet", None)
    other = ["--set", "data.kind=parquet", "--set", f"data.path={tmp_path / 'plain.parquet'}"]
    done = invoke("eval-knn", run_dir, *other, "--set", f"data.cache_dir={tmp_path / 'cache'}")
    assert done.code == 2
    assert done.stdout == ""
    assert "the images have no labels" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fast", [False, True])
def test_linear_probe(invoke: Invoke, run_dir: Path, fast: bool) -> None:
    options = ["--epochs", "2", *(["--fast"] if fast else [])]
    weights = run_dir / "checkpoints" / "step-00000006" / "model.safetensors"
    before = weights.read_bytes()
    done = invoke("eval-linear", run_dir, "--encoder", "online", "--encoder", "untrained", *options, "--json")
    assert done.code == 0, done.stderr
    assert weights.read_bytes() == before
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"] * 2
    results = json.loads(done.stdout)["results"]
    name = "linear (fast)" if fast else "linear"
    assert [score["metric"].removeprefix(f"{name}, 2 epochs") for score in results[0]["scores"]] == [
        *("", ", top 5", ", mean per class")
    ]
    protocol = results[0]["protocol"]
    assert protocol["optimizer"] == {
        "name": "SGD",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 256,
        "tenth_after_epochs": [1, 2],
    }
    assert protocol["training_view"] == (
        "the centre view" if fast else {"random_resized_crop": [0.08, 1.0], "flip": 0.5}
    )
    again = json.loads(invoke("eval-linear", run_dir, *options, "--json").stdout)["results"][0]
    assert again["scores"] == results[0]["scores"]
    assert len(list((run_dir / "results").iterdir())) == 2


def test_checkpoint_outside_a_run_is_saved_only_with_out(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    (run_dir / "checkpoints" / "step-00000006").rename(bare)
    done = invoke("eval-knn", bare)
    assert done.code == 0, done.stderr
    assert "results will not be saved" in done.stderr
    done = invoke("eval-knn", bare, "--out", tmp_path / "here")
    assert done.code == 0, done.stderr
    assert [json.loads(path.read_text())["checkpoint"] for path in (tmp_path / "here").iterdir()] == [str(bare)]
    (tmp_path / "file").write_text("")
    done = invoke("eval-knn", bare, "--out", tmp_path / "file" / "below")
    assert done.code == 2
    assert "cannot create the folder" in done.stderr


def change_weights(run_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the saved weights and update the manifest, as a conversion script would."""
    folder = run_dir / "checkpoints" / "step-00000006"
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest["sha256"] = checkpoint.seal_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_missing_or_unexpected_weights_are_errors(invoke: Invoke, run_dir: Path) -> None:
    name = "online.backbone.stem.0.weight"
    kept = safetensors.torch.load_file(run_dir / "checkpoints" / "step-00000006" / "model.safetensors")[name]
    change_weights(run_dir, lambda weights: weights.pop(name))
    for command in ("eval-knn", "eval-linear"):
        done = invoke(command, run_dir)
        assert (done.code, done.stdout) == (2, "")
        assert "the weights do not fit the checkpoint's config" in done.stderr
        assert f'Missing key(s) in state_dict: "{name}"' in done.stderr
        assert "Traceback" not in done.stderr
    change_weights(run_dir, lambda weights: weights.update({name: kept, "online.backbone.extra": kept.clone()}))
    done = invoke("eval-knn", run_dir)
    assert done.code == 2
    assert 'Unexpected key(s) in state_dict: "online.backbone.extra"' in done.stderr
    assert not list((run_dir / "results").glob("*"))


def test_features_that_are_not_finite_are_errors(invoke: Invoke, run_dir: Path) -> None:
    change_weights(run_dir, lambda weights: weights["online.backbone.stem.0.weight"].fill_(torch.inf))
    done = invoke("eval-knn", run_dir)
    assert done.code == 2
    assert "the embedding of demo[0] is not finite" in done.stderr
    assert invoke("eval-knn", run_dir, "--encoder", "target").code == 0


def test_user_errors_exit_with_2(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"format": "something else"}')
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    cut = shutil.copytree(run_dir, tmp_path / "cut") / "checkpoints" / "step-00000006" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    for command in ("eval-knn", "eval-linear"):
        for arguments, complaint in [
            ([tmp_path / "nowhere"], "no such run directory or checkpoint"),
            ([tmp_path / "empty"], "neither a run directory"),
            ([tmp_path / "foreign"], "not that of an msf-faiss checkpoint"),
            ([tmp_path / "foreign.pt"], "is a file of weights, which does not say what data"),
            ([tmp_path / "cut"], "model.safetensors has"),
            ([run_dir, "--set", "data.kind=parquet", "--set", "data.path=nowhere.parquet"], "nowhere.parquet"),
            ([run_dir, "--set", "data.sise=3"], "data.sise"),
            ([run_dir, "--set", "train.epochs=3"], "only data.…, views.… and train.threads can be set"),
            ([run_dir, "--encoder", "best"], "'best' is not one of"),
            ([run_dir, "--batch-size", "0"], "--batch-size"),
        ]:
            done = invoke(command, *arguments)
            assert (done.code, done.stdout) == (2, ""), complaint
            assert complaint in done.stderr
            assert "Traceback" not in done.stderr
    for option, value in (("--k", "0"), ("--temperature", "0"), ("--limit", "1")):
        assert invoke("eval-knn", run_dir, option, value).code == 2


def test_results_of_a_run(invoke: Invoke, run_dir: Path) -> None:
    encoders = ["--encoder", "online", "--encoder", "untrained"]
    assert invoke("eval-knn", run_dir, *encoders, "--encoder", "pixels", "--k", "1", "--k", "20").code == 0
    assert invoke("eval-linear", run_dir, *encoders, "--fast").code == 0
    (run_dir / "neighbors").mkdir()
    (run_dir / "neighbors" / "page.html").write_text("")
    (run_dir / "neighbors" / "records.json").write_text("")
    done = invoke("results", run_dir)
    assert (done.code, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == f"{run_dir}, step 6 (epoch 2): accuracy in %"
    assert lines[1].startswith(
        "demo: 20 held-out images, 48 training images; 10 classes, chance 10.0%, majority class "
    )
    assert any(line.split() == ["trained", "untrained", "raw", "pixels", "gain"] for line in lines)

    documents = json.loads(invoke("results", run_dir, "--json").stdout)
    assert len(documents["results"]) == 5
    found = accuracies(documents["results"])
    one = [100 * found[encoder, "1-NN"] for encoder in ("online", "untrained", "pixels")]
    shown = next(line for line in lines if line.startswith("1-NN")).split()
    assert shown == ["1-NN", *(f"{value:.1f}" for value in one), f"{one[0] - one[1]:+.1f}"]
    assert any(line.startswith("linear (fast)") and line.split()[4] == "–" for line in lines)
    assert "gain: trained minus untrained, in percentage points" in lines
    assert lines[-1] == f"neighbours: {run_dir / 'neighbors' / 'page.html'}"
    assert documents["neighbor_pages"] == [str(run_dir / "neighbors" / "page.html")]


def test_results_of_a_run_without_any(invoke: Invoke, run_dir: Path, tmp_path: Path) -> None:
    done = invoke("results", run_dir)
    assert (done.code, done.stdout) == (2, "")
    assert f"no results yet; run `msf-faiss eval-knn {run_dir}" in done.stderr
    assert json.loads(invoke("results", run_dir, "--json").stdout)["results"] == []
    assert invoke("results", tmp_path / "nowhere").code == 2
    (run_dir / "results").mkdir()
    (run_dir / "results" / "notes.json").write_text("{}")
    done = invoke("results", run_dir)
    assert done.code == 2
    assert "notes.json: not a result" in done.stderr
