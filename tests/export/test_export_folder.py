"""The folder of an export is atomic and never replaces other files; its model card is complete and safe."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from networks import CIFAR, NARROW, MakeCheckpoint

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import EvalEncoder, Result, Score, save_result
from msf_faiss.export import export_encoder, folder
from msf_faiss.export.card import plain
from msf_faiss.export.folder import strip_folders

RunOf = Callable[..., Path]


def result(
    checkpoint: Checkpoint, encoder: EvalEncoder, accuracy: float, *, path: str = "/home/somebody/cats", **protocol: Any
) -> Result:
    trained = encoder in ("online", "target")
    data = {
        "config": {"kind": "folder", "path": path, "test_path": None},
        "training_images": 30,
        "held_out_images": None,
        "classes": 3,
        "commonest_class": 0.5,
        "left_out": {},
    }
    return Result(
        evaluation="knn",
        encoder=encoder,
        checkpoint="checkpoints/step-00000012" if trained else None,
        weights=checkpoint.files["model.safetensors"] if trained else None,
        step=12 if trained else 0,
        epoch=1.5 if trained else 0,
        scores=(Score(metric="20-NN", accuracy=accuracy, correct=1, images=30, settings={"k": 20}),),
        protocol={"data": data, "view": {"resize": 32}, "encoder": encoder, "vote": "majority", **protocol},
        created=f"2026-11-25T12:00:{round(100 * accuracy) % 60:02d}+00:00",
        device="cpu",
        seconds=1.0,
        versions={},
    )


def export(run: Path, **options: Any) -> Path:
    return export_encoder(load_encoder(run), "safetensors", **options)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_facts_list_every_file(run_of: RunOf) -> None:
    run = run_of(NARROW)
    out = export(run)
    assert out == run / "exports" / "safetensors-online-step-00000012"
    facts = json.loads((out / "msf-faiss.json").read_text())
    assert facts["files"].keys() | {"msf-faiss.json"} == {path.name for path in out.iterdir()}
    for name, file in facts["files"].items():
        content = (out / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    weights = (run / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes()
    assert facts["checkpoint"]["sha256"] == hashlib.sha256(weights).hexdigest()
    card = (out / "README.md").read_text()
    assert facts["checkpoint"]["sha256"] in card
    assert facts["files"]["model.safetensors"]["sha256"] in card
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in yaml.safe_load(front)
    assert "arXiv:2105.07269" in card
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_card_shows_results_of_the_exported_weights_only(run_of: RunOf) -> None:
    run = run_of(NARROW)
    checkpoint = find_checkpoint(run)
    assert "These weights have not been evaluated" in (export(run) / "README.md").read_text()
    others = replace(result(checkpoint, "online", 0.99), weights="0" * 64, step=3)
    save_result(others, run / "results")
    save_result(result(checkpoint, "target", 0.98), run / "results")
    save_result(result(checkpoint, "untrained", 0.213), run / "results")
    assert "These weights have not been evaluated" in (export(run) / "README.md").read_text()
    save_result(result(checkpoint, "online", 0.432), run / "results")
    out = export(run)
    card = (out / "README.md").read_text()
    assert "| | this encoder | untrained | protocol |" in card
    assert "| 20-NN | 43.2 | 21.3 | 1 |" in card
    assert "\n1. knn: view: resize 32; encoder: online; vote: majority\n" in card
    assert "cats: 30 training images, leave-one-out; 3 classes, chance 33.3%, majority class 50.0%" in card
    assert "99.0" not in card
    assert "98.0" not in card
    assert "somebody" not in card + (out / "msf-faiss.json").read_text()
    scores = [each["scores"][0]["accuracy"] for each in json.loads((out / "msf-faiss.json").read_text())["results"]]
    assert sorted(scores) == [0.213, 0.432]


def test_card_leaves_out_baselines_of_another_protocol(run_of: RunOf) -> None:
    run = run_of(NARROW)
    checkpoint = find_checkpoint(run)
    save_result(result(checkpoint, "online", 0.4), run / "results")
    assert "the baseline for every number, was not evaluated" in (export(run) / "README.md").read_text()
    save_result(result(checkpoint, "untrained", 0.2, limit=10), run / "results")
    assert "| 20-NN | 40.0 | – | 1 |" in (export(run) / "README.md").read_text()


def test_names_are_escaped_in_the_card(run_of: RunOf) -> None:
    hostile = "/x/a|b\n# <img src=x>[l](http://x)`*_\udcff"
    run = run_of(NARROW)
    checkpoint = find_checkpoint(run)
    save_result(result(checkpoint, "online", 0.4, path=hostile), run / "results")
    card = (export(run) / "README.md").read_text()
    assert "<img" not in card.replace("\\<img", "")
    assert "\n# \\<" not in card
    assert plain("a|b\n<i>`x`") == "a\\|b\N{REPLACEMENT CHARACTER}\\<i\\>\\`x\\`"


def test_strip_folders_keeps_the_last_part_of_absolute_paths() -> None:
    value = {"a": ["/home/me/x", "ylecun/mnist", "data"], "b": {"c": "C:\\me\\y"}, "d": 1, "e": None}
    assert strip_folders(value) == {"a": ["x", "ylecun/mnist", "data"], "b": {"c": "y"}, "d": 1, "e": None}


def test_second_export_updates_results_and_refuses_edited_files(run_of: RunOf) -> None:
    run = run_of(NARROW)
    out = export(run)
    save_result(result(find_checkpoint(run), "online", 0.4), run / "results")
    assert export(run) == out
    assert "| 20-NN | 40.0 |" in (out / "README.md").read_text()
    card = out / "README.md"
    card.write_text(card.read_text().replace("# license: choose", "license: mit # choose"))
    before = contents(out)
    with pytest.raises(UserError, match=r"README.md was edited since the export.*--force"):
        export(run)
    assert contents(out) == before
    export(run, force=True)
    assert "license: mit" not in card.read_text()


def test_export_replaces_no_other_files(run_of: RunOf, checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    run = run_of(NARROW)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match=r"contains notes\.txt, which no export wrote"):
            export(run, out=mine, force=force)
        with pytest.raises(UserError, match="is a file, but an export is a folder"):
            export(run, out=mine / "notes.txt", force=force)
    out = export(run)
    (out / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match=r"contains notes\.txt, which no export wrote"):
            export(run, out=out, force=force)
    (out / "notes.txt").unlink()
    target = load_encoder(run, "target")
    with pytest.raises(UserError, match=r"contains another export; .*--force"):
        export_encoder(target, "safetensors", out)
    export_encoder(target, "safetensors", out, force=True)
    assert json.loads((out / "msf-faiss.json").read_text())["encoder"] == "target"
    assert contents(mine) == {"notes.txt": b"mine"}


def test_full_disk_leaves_the_old_export_intact(run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(NARROW)
    out = export(run)
    before = contents(out)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "render_card", full)
    for to in (out, tmp_path / "new" / "export"):
        with pytest.raises(UserError, match=r"cannot write the export: No space left on device"):
            export(run, out=to)
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert list((tmp_path / "new").iterdir()) == []


def test_failed_rename_restores_the_old_export(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(NARROW)
    out = export(run)
    before, rename = contents(out), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        export(run)
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("format", "backbone", "projector", "complaint"),
    [
        ("torchvision", NARROW, False, r"torchvision does not have this network \(narrow ResNet.*safetensors or onnx"),
        ("timm", NARROW, False, r"timm does not have this network \(narrow ResNet.*safetensors or onnx"),
        ("timm", CIFAR, False, r"does not have the CIFAR stem.*--format torchvision .*safetensors or onnx"),
        ("torchvision", "resnet18", True, r"have no projector.*safetensors or onnx"),
        ("timm", "resnet18", True, r"have no projector.*safetensors or onnx"),
    ],
)
def test_formats_refuse_encoders_they_cannot_hold(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, format: Any, backbone: Any, projector: bool, complaint: str
) -> None:
    unfit = load_encoder(checkpoint_of(backbone, size=32, eval_resize=41), projector=projector)
    with pytest.raises(UserError, match=complaint):
        export_encoder(unfit, format, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_onnx_needs_its_libraries(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'msf-faiss\[onnx\]'"):
        export_encoder(load_encoder(checkpoint_of(NARROW)), "onnx", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    encoder = load_encoder(checkpoint_of(NARROW), "target")
    encoder.network.get_buffer("stem.1.running_var")[0] = torch.inf
    with pytest.raises(UserError, match="the target encoder has weights that are not finite"):
        export_encoder(encoder, "safetensors", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_outside_a_run_needs_out(run_of: RunOf, tmp_path: Path) -> None:
    lone = shutil.move(run_of(NARROW) / "checkpoints" / "step-00000012", tmp_path / "lone")
    with pytest.raises(UserError, match="lies outside a run; name a folder for the export with --out"):
        export(lone)
    card = (export(lone, out=tmp_path / "out") / "README.md").read_text()
    assert "the checkpoint lies outside a run" in card
