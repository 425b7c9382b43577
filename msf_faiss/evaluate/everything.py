"""All evaluations that the data allow, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from msf_faiss.evaluate import logistic
from msf_faiss.evaluate.finetune import FinetuneEpoch
from msf_faiss.evaluate.linear import ProbeEpoch
from msf_faiss.evaluate.protocol import Notify
from msf_faiss.evaluate.results import EncoderName, Result
from msf_faiss.evaluate.scoring import score_knn, score_linear
from msf_faiss.evaluate.semi import FRACTIONS, Mode, score_semi
from msf_faiss.evaluate.setup import EvalSetup
from msf_faiss.evaluate.transfer import score_transfer

Part = Literal["knn", "linear", "semi", "transfer"]
PARTS: tuple[Part, ...] = get_args(Part)

KS, TEMPERATURES = (1, 20, 200), (0.07, 0.1)


def score_everything(
    setup: EvalSetup,
    encoder: EncoderName,
    *,
    parts: Sequence[Part] = PARTS,
    fast: bool = False,
    batch_size: int = 256,
    on_epoch: Callable[[ProbeEpoch | FinetuneEpoch], None] = lambda done: None,
    notify: Notify = lambda line: None,
) -> Iterator[Result]:
    """Every evaluation of one encoder, each as soon as it is done, on features that are computed once if they are kept.

    Of raw pixels, and of the target encoder beside an online one, the neighbours alone.

    Args:
        setup: weights and images; without held-out images there is nothing but kNN.
        encoder: whose features.
        parts: which evaluations.
        fast: no augmentation for the linear layer, no fine-tuning, and a quarter of the penalties.
        batch_size: images embedded at a time.
        on_epoch: told after each epoch of a linear layer or a fine-tune.
        notify: told what happens next.

    Raises:
        UserError: as the evaluations themselves.
    """
    if "knn" in parts:
        yield score_knn(setup, encoder, ks=KS, temperatures=TEMPERATURES, batch_size=batch_size, notify=notify)
    if encoder in ("pixels", "target"):
        return
    if setup.test is None:
        if set(parts) != {"knn"}:
            notify(f"{encoder}: {', '.join(part for part in parts if part != 'knn')} need held-out images; left out")
        return
    if "linear" in parts:
        yield score_linear(setup, encoder, fast=fast, batch_size=batch_size, on_epoch=on_epoch, notify=notify)
    modes: tuple[Mode, ...] = ("linear",) if fast else ("linear", "fine-tune")
    if "semi" in parts:
        for fraction in FRACTIONS:
            for mode in modes:
                yield score_semi(
                    setup,
                    encoder,
                    labels=fraction,
                    mode=mode,
                    fast=fast,
                    batch_size=batch_size,
                    on_epoch=on_epoch,
                    notify=notify,
                )
    if "transfer" in parts:
        strengths = logistic.GRID[::4] if fast else logistic.GRID
        yield score_transfer(setup, encoder, strengths=strengths, batch_size=batch_size, notify=notify)
