"""Measure what an encoder has learnt after so many minutes: msf-faiss next to methods of the library lightly.

    pip install -r benchmarks/race-requirements.txt
    python benchmarks/race.py TRAIN.parquet TEST.parquet --out race.json \
        [--methods msf simclr byol moco nnclr] [--minutes 5] [--seeds 0 1 2] [--size 32]

All methods train the same network from the same weights, in bfloat16 and in batches of 256 images, alone on the same
cores, for the same wall time. The peers have the heads, losses, views and optimizers of lightly's CIFAR-10 benchmark,
whose learning rate decays over the time; msf-faiss has `--config`, for as many epochs as fit. Time includes the making
of views, and neither decoding, which all do once before, nor evaluation. All are evaluated by `msf-faiss eval-knn` and
`eval-linear --fast`. Rows that FILE has already are not run again.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from msf_faiss.config import Config
from msf_faiss.config.load import dump_config, load_config
from msf_faiss.data.sources.open import open_source
from msf_faiss.models import build_model
from msf_faiss.run.events import RunEnded, TrainingProgress
from msf_faiss.train.trainer import pretrain

BATCH = 256
PEERS = ("simclr", "byol", "moco", "nnclr")
TRIAL_STEPS = 60

Loss = Callable[[Tensor, Tensor], Tensor]


class Images(torch.utils.data.Dataset[list[Tensor]]):
    """Decoded images, with a transform of PIL images as lightly's data sets have it."""

    def __init__(self, images: list[object], transform: Callable[[object], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def create_peer(method: str, backbone: nn.Module, features: int) -> tuple[Loss, list[nn.Module]]:
    """The loss of two views, and the modules that are trained, as in lightly's CIFAR-10 benchmark.

    Widths are the benchmark's, in proportion to the backbone's features where it has 512.
    """
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import NNMemoryBankModule, heads
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    def averaged(*modules: nn.Module) -> nn.Sequential:
        copied = copy.deepcopy(nn.Sequential(*modules))
        deactivate_requires_grad(copied)
        return copied

    if method == "simclr":
        network = nn.Sequential(backbone, heads.SimCLRProjectionHead(features, features, 128))
        contrast = NTXentLoss()
        return lambda one, two: contrast(network(one), network(two)), [network]
    if method == "moco":
        network = nn.Sequential(backbone, heads.MoCoProjectionHead(features, features, 128))
        momentum, queue = averaged(*network), NTXentLoss(temperature=0.1, memory_bank_size=(8192, 128))

        def moco(one: Tensor, two: Tensor) -> Tensor:
            update_momentum(network, momentum, 0.99)
            with torch.no_grad():
                keys = momentum(one), momentum(two)
            return 0.5 * (queue(network(one), keys[1]) + queue(network(two), keys[0]))

        return moco, [network]
    if method == "byol":
        network = nn.Sequential(backbone, heads.BYOLProjectionHead(features, 1024, 256))
        predictor, momentum = heads.BYOLPredictionHead(256, 1024, 256), averaged(*network)
        similarity = NegativeCosineSimilarity()

        def byol(one: Tensor, two: Tensor) -> Tensor:
            update_momentum(network, momentum, 0.99)
            with torch.no_grad():
                targets = momentum(one), momentum(two)
            return 0.5 * (
                similarity(predictor(network(one)), targets[1]) + similarity(predictor(network(two)), targets[0])
            )

        return byol, [network, predictor]
    network = nn.Sequential(backbone, heads.NNCLRProjectionHead(features, 2048, 256))
    predictor, bank, contrast = heads.NNCLRPredictionHead(256, 4096, 256), NNMemoryBankModule((8192, 256)), NTXentLoss()

    def nnclr(one: Tensor, two: Tensor) -> Tensor:
        first, second = network(one), network(two)
        asked = predictor(first), predictor(second)
        nearest = bank(first.detach().float(), update=False), bank(second.detach().float(), update=True)
        return 0.5 * (contrast(nearest[0], asked[1]) + contrast(nearest[1], asked[0]))

    return nnclr, [network, predictor]


def batches(config: Config) -> Iterator[list[Tensor]]:
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image

    source = open_source(config.data, "train")
    assert source is not None
    images: list[object] = [to_pil_image(source.decode(index)) for index in range(len(source))]
    normalize = {"mean": list(config.views.mean), "std": list(config.views.std)}
    transform = SimCLRTransform(input_size=config.views.size, gaussian_blur=0.0, normalize=normalize)
    loader = torch.utils.data.DataLoader(
        Images(images, transform), BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    while True:
        yield from loader


def train_peer(method: str, config: Config, seconds: float, out: Path) -> dict[str, float]:
    torch.manual_seed(config.seed)
    online = build_model(config.model, seed=config.seed).online
    backbone = online.backbone.to(memory_format=torch.channels_last)
    loss_of, trained = create_peer(method, backbone, online.feature_dim)
    rate = 0.06 * BATCH / 128
    optimizer = torch.optim.SGD(
        [parameter for module in trained for parameter in module.parameters()], rate, momentum=0.9, weight_decay=5e-4
    )
    stream, steps = batches(config), 0
    next(stream)  # which starts the workers
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * elapsed / seconds))
        one, two = (view.contiguous(memory_format=torch.channels_last) for view in next(stream))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(one, two)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    save_file({name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}, out)
    return {"seconds": elapsed, "steps": steps}


def train_msf(config: Config, seconds: float, out: Path) -> dict[str, float]:
    def run(name: str, epochs: int, max_steps: int | None) -> tuple[RunEnded, float]:
        changes = {"epochs": epochs, "max_steps": max_steps}
        settings = config.model_copy(update={"train": config.train.model_copy(update=changes)})
        for event in pretrain(settings, out / name):
            if isinstance(event, TrainingProgress):
                rate = event.images_per_second
        assert isinstance(event, RunEnded)
        return event, rate

    _, rate = run("trial", 1, TRIAL_STEPS)
    source = open_source(config.data, "train")
    assert source is not None
    epochs = max(1, int(seconds * rate / len(source)))
    ended, _ = run("run", epochs, None)
    return {"seconds": ended.seconds, "steps": ended.step}


def evaluate(path: Path, *options: str) -> dict[str, float]:
    """Accuracies in % by name."""
    scores = {}
    for command in (["eval-knn"], ["eval-linear", "--fast"]):
        arguments = [sys.executable, "-m", "msf_faiss_cli", *command, str(path), "--no-keep", "--json", *options]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
        (result,) = json.loads(done.stdout)["results"]
        scores |= {score["metric"]: round(100 * score["accuracy"], 2) for score in result["scores"]}
        if "pixels" in options:  # a linear probe of pixels is not offered
            break
    return {name: scores[name] for name in ("20-NN", "200-NN, T 0.1", "linear (fast)") if name in scores}


def configure(arguments: argparse.Namespace, seed: int) -> Config:
    """The config of the race, in which `--config` sets what is not given by the race."""
    small = arguments.size <= 32
    data = {"kind": "parquet", "path": str(arguments.train), "test_path": str(arguments.test), "cache": "memory"}
    overrides = {
        "seed": seed,
        "data": json.dumps(data),
        "views.size": arguments.size,
        "views.strong.blur": 0.0 if small else 0.5,
        "model.backbone": json.dumps({"kind": "narrow", "width": 32, "depths": [1, 1, 1], "strides": [2, 2, 2]}),
        "train.batch_size": BATCH,
        "train.precision": "bfloat16",
        "train.device": "cpu",
        "checkpoint.every_minutes": "null",
        "checkpoint.every_epochs": 1_000_000,
        "knn.every_epochs": "null",
    }
    return load_config(arguments.config, [f"{key}={value}" for key, value in overrides.items()])


def race(method: str, config: Config, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if method in ("untrained", "pixels"):
            short = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1, "max_steps": 1})})
            for _ in pretrain(short, folder / "run"):
                pass
            return evaluate(folder / "run", "--encoder", method)
        if method in PEERS:
            row = train_peer(method, config, seconds, folder / "weights.safetensors")
            (folder / "config.yaml").write_text(dump_config(config))
            return row | evaluate(folder / "weights.safetensors", "--config", str(folder / "config.yaml"))
        row = train_msf(config, seconds, folder)
        return row | evaluate(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path, help="Parquet file of training images with labels")
    parser.add_argument("test", type=Path, help="Parquet file of held-out images")
    parser.add_argument("--out", type=Path, default=Path("race.json"))
    parser.add_argument("--methods", nargs="+", default=["pixels", "untrained", "msf", *PEERS])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=32, help="pixels of a view's side")
    parser.add_argument("--config", default="cifar10", help="of msf-faiss")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for seed in arguments.seeds:
        for method in arguments.methods:
            key = {
                "method": method,
                "seed": seed,
                "size": arguments.size,
                "data": arguments.train.stem,
                "minutes": 0 if method in ("untrained", "pixels") else arguments.minutes,
                "config": arguments.config if method == "msf" else None,
            }
            if any(key.items() <= row.items() for row in rows):
                continue
            rows.append(key | race(method, configure(arguments, seed), 60 * arguments.minutes))
            arguments.out.write_text(json.dumps(rows, indent=1))
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
