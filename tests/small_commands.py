"""Documented commands as they stand, made small by what is added at their end."""

import subprocess

DEMO = "data.images=64 data.test_images=30 train.batch_size=32 train.max_steps=2 optimizer.warmup_epochs=0"
"""Makes the demo a run of two steps."""
_OTHERS = "train.batch_size=4 train.max_steps=1 data.workers=0 model.backbone.kind=narrow model.backbone.width=4"
_OPTIONS = {"eval-linear": "--epochs 2"}


def made_small(command: str) -> list[str]:
    """The words of `command`, with settings or options that it does not have itself."""
    words = shell_words(command)
    if "pretrain" in words:
        config = words[words.index("pretrain") + 1]
        settings = (DEMO if config == "demo" else _OTHERS).split()
        if "--profile" in words:
            settings.append("train.max_steps=18")
        own = {word.partition("=")[0] for word in words}
        words += [part for setting in settings if setting.partition("=")[0] not in own for part in ("--set", setting)]
    for name, options in _OPTIONS.items():
        if name in words and options.split()[0] not in words:
            words += options.split()
    return words


def shell_words(command: str) -> list[str]:
    """What bash makes of the words of `command`, quotes and braces included."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]
