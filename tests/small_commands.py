"""Run documented commands, with settings appended that make them small."""

import subprocess
import sys

import pytest

DEMO = [
    *("data.images=64", "data.test_images=30", "train.batch_size=32", "train.epochs=1"),
    "optimizer.warmup_epochs=0",
]
"""Settings that make the demo a run of two steps."""
_OTHER_CONFIGS = [
    *("train.batch_size=4", "train.max_steps=1", "data.workers=0"),
    "model.backbone={kind: narrow, width: 4}",
]
_OPTIONS = {
    "eval-all": ["--fast"],
    "eval-linear": ["--epochs", "2"],
    "eval-semi": ["--epochs", "2"],
    "eval-transfer": ["--fast"],
}


def made_small(command: str) -> list[str]:
    """Return the words of `command`, with small settings and options appended where it sets none itself."""
    words = shell_words(command)
    own = tuple(words)
    if "pretrain" in words:
        settings = DEMO if words[words.index("pretrain") + 1] == "demo" else _OTHER_CONFIGS
        if "--profile" in words:
            settings = [*settings, "train.epochs=9"]  # overrides the one before
        for setting in settings:
            if not any(word.startswith(setting.partition("=")[0]) for word in own):
                words += ["--set", setting]
    for name, options in _OPTIONS.items():
        if name in words and options[0] not in words:
            words += options
    return words


def shell_words(command: str) -> list[str]:
    """Split `command` into words as bash does, with quotes and braces."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def run(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Run msf-faiss in this process, because starting a new one takes seconds, and other commands in a new one."""
    from msf_faiss_cli.main import main

    words = made_small(command)
    if words[0] != "msf-faiss":
        torchrun = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        other = torchrun if words[0] == "torchrun" else ["bash", "-c", command]
        done = subprocess.run(other, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr("msf_faiss.evaluate.linear.MIN_STEPS", 80)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, f"{command}\n{capfd.readouterr().err}"
