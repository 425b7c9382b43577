"""However the bytes of a checkpoint are damaged, no run resumes from them, and no run ends without an error message."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import metrics, tensors

from msf_faiss.config import (
    CheckpointConfig,
    Config,
    DemoData,
    FlatBankConfig,
    KnnConfig,
    ModelConfig,
    NarrowBackbone,
    TrainConfig,
    ViewsConfig,
)
from msf_faiss.errors import UserError
from msf_faiss.run.events import Event, RunStarted
from msf_faiss.run.recorder import Recorder
from msf_faiss.train.resume import Resume
from msf_faiss.train.trainer import pretrain

CONFIG = Config(
    seed=5,
    data=DemoData(images=70, test_images=20, size=16),
    views=ViewsConfig(size=16),
    model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1, 1), strides=(2, 2)), dim=8),
    bank=FlatBankConfig(capacity=100, k=3),
    train=TrainConfig(epochs=3, batch_size=16, log_every=1, device="cpu"),
    checkpoint=CheckpointConfig(every_epochs=1, keep_last=10),
    knn=KnnConfig(every_epochs=2, k=5),
)

CASES = 240
FINISH_EVERY = 10

Damage = Callable[[Path, random.Random], str]
"""Changes a file of a checkpoint and describes the change."""


def flip(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place, bit = place_in(content, chance), chance.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def zero(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place, length = place_in(content, chance), chance.randint(1, 64)
    end = min(place + length, len(content))
    content[place:end] = bytes(end - place)
    file.write_bytes(content)
    return f"bytes {place} to {end} zeroed"


def truncate(file: Path, chance: random.Random) -> str:
    content = file.read_bytes()
    place = place_in(content, chance)
    file.write_bytes(content[:place])
    return f"cut off at {place}"


def append(file: Path, chance: random.Random) -> str:
    added = chance.randbytes(chance.randint(1, 64))
    file.write_bytes(file.read_bytes() + added)
    return f"{added!r} appended"


def duplicate(file: Path, chance: random.Random) -> str:
    content = file.read_bytes()
    place, length = place_in(content, chance), chance.randint(1, 64)
    file.write_bytes(content[: place + length] + content[place : place + length] + content[place + length :])
    return f"{length} bytes at {place} doubled"


def swap(file: Path, chance: random.Random) -> str:
    """The contents of another file, of the same checkpoint or of the one before."""
    other = chance.choice(sorted(file.parent.parent.glob("step-*/*")))
    file.write_bytes(other.read_bytes())
    return f"is now {other.parent.name}/{other.name}"


def delete(file: Path, chance: random.Random) -> str:
    file.unlink()
    return "deleted"


DAMAGES: list[Damage] = [flip, flip, flip, zero, truncate, append, duplicate, swap, delete]


def place_in(content: bytes | bytearray, chance: random.Random) -> int:
    """A random position, as often in the header as in the much longer body."""
    length = int.from_bytes(content[:8], "little")
    header = 8 + length if length < len(content) else len(content)
    regions = [(0, min(8, header)), (0, header), (min(header, len(content) - 1), len(content))]
    return chance.randrange(*chance.choice(regions))


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def same_content(file: Path, before: bytes) -> bool:
    """Whether a manifest has the same content as before, as after a change between blanks."""
    if file.name != "manifest.json" or not file.exists():
        return False
    try:
        return bool(json.loads(file.read_bytes()) == json.loads(before))
    except ValueError:
        return False


def cases(folder: Path, whole: Path) -> Iterator[tuple[int, Path, Path, str, bool]]:
    """Copies of a run with one file of the newest checkpoint damaged.

    Yields:
        Number of the case, the copy, the changed file, a description of the change, and whether it has no effect.
    """
    chance, number = random.Random(0), 0
    names = sorted(path.name for path in newest(whole).iterdir())
    while number < CASES:
        run_dir = folder / "run"
        shutil.copytree(whole, run_dir)
        file = newest(run_dir) / names[number % len(names)]
        before = file.read_bytes()
        done = chance.choice(DAMAGES)(file, chance)
        if not file.exists() or file.read_bytes() != before:
            yield number, run_dir, file, f"case {number}: {file.name}: {done}", same_content(file, before)
            number += 1
        shutil.rmtree(run_dir)


def run(config: Config, run_dir: Path, resume: Resume = "never") -> list[Event]:
    reports = []
    with Recorder(run_dir) as record:
        for report in pretrain(config, run_dir, resume=resume):
            record(report)
            reports.append(report)
    return reports


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after steps 4, 8 and 12."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(CONFIG, run_dir)
    shutil.rmtree(run_dir / "tensorboard")
    return run_dir


def begin(run_dir: Path) -> RunStarted:
    """Start a run and leave it before its first step."""
    reports = pretrain(CONFIG, run_dir)
    started = next(reports)
    reports.close()  # type: ignore[attr-defined]
    assert isinstance(started, RunStarted)
    return started


def same_outcome(run_dir: Path, whole: Path) -> bool:
    found, expected = tensors(run_dir, 12), tensors(whole, 12)
    return (
        found.keys() == expected.keys()
        and all(torch.equal(found[name], expected[name]) for name in expected)
        and metrics(run_dir) == metrics(whole)
    )


def test_resume_never_uses_a_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    damaged_files, refused, harmless, finished = set(), [], [], 0
    for number, run_dir, file, what, same in cases(tmp_path, whole):
        checkpoint, before = file.parent, contents(run_dir)
        finish = number % FINISH_EVERY == 0
        try:
            if finish:
                reports = run(CONFIG, run_dir, resume="auto")
                started = reports[0]
                assert isinstance(started, RunStarted), what
            else:
                started = begin(run_dir)
        except UserError as error:
            refused.append(f"{what}: {error}")
            continue
        if same:
            harmless.append(what)
            assert started.first_step == 12, what
            assert not list(checkpoint.parent.glob("damaged-*")), what
            assert same_outcome(run_dir, whole), what
            continue
        damaged_files.add(file.name)
        assert started.first_step == 8, what
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        (note,) = started.notes
        assert note.startswith(f"{checkpoint}: the checkpoint is damaged: "), what
        assert f"Renamed it to {aside.name}; resuming from an older checkpoint" in note, what
        prefix, moved = f"checkpoints/{checkpoint.name}/", f"checkpoints/{aside.name}/"
        kept = {moved + name.removeprefix(prefix): data for name, data in before.items() if name.startswith(prefix)}
        assert {f"{moved}{name}": data for name, data in contents(aside).items()} == kept, what
        if finish:
            finished += 1
            assert same_outcome(run_dir, whole), what
        else:
            assert not checkpoint.exists(), what
    assert damaged_files == {path.name for path in newest(whole).iterdir()}
    assert finished >= CASES // FINISH_EVERY - len(refused) - len(harmless)
    assert len(harmless) <= CASES // 20
    assert refused == []


def test_resume_skips_two_damaged_checkpoints(whole: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    truncate(run_dir / "checkpoints" / "step-00000012" / "model.safetensors", chance)
    flip(run_dir / "checkpoints" / "step-00000008" / "bank.safetensors", chance)
    started = run(CONFIG, run_dir, resume="auto")[0]
    assert isinstance(started, RunStarted)
    assert started.first_step == 4
    assert [note.partition(":")[0].rpartition("/")[2] for note in started.notes] == ["step-00000012", "step-00000008"]
    assert {path.name for path in (run_dir / "checkpoints").glob("damaged-*")} == {
        *("damaged-step-00000012", "damaged-step-00000008")
    }
    assert same_outcome(run_dir, whole)


@pytest.mark.parametrize("seed", range(12))
def test_resume_fails_and_changes_nothing_if_all_are_damaged(whole: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for checkpoint in sorted((run_dir / "checkpoints").iterdir()):
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != "manifest.json")
        chance.choice([flip, truncate, append, delete])(checkpoint / chance.choice(names), chance)
    before = contents(run_dir)
    with pytest.raises(UserError, match="every checkpoint of the run is damaged; nothing was changed") as caught:
        run(CONFIG, run_dir, resume="auto")
    for step in (4, 8, 12):
        assert f"step-{step:08d}: the checkpoint is damaged: " in str(caught.value)
    assert contents(run_dir) == before


def test_blanks_in_a_manifest_are_ignored(whole: Path, tmp_path: Path) -> None:
    """The seal covers the content, not the layout."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    manifest = newest(run_dir) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\n\t") + b"\n")
    started = run(CONFIG, run_dir, resume="auto")[0]
    assert isinstance(started, RunStarted)
    assert (started.first_step, started.notes) == (12, ())
    assert same_outcome(run_dir, whole)
