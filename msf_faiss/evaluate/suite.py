"""Score one encoder with every evaluation that the data allow."""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from msf_faiss.evaluate import logistic
from msf_faiss.evaluate.results import EvalEncoder, Result
from msf_faiss.evaluate.scoring import score_knn, score_linear
from msf_faiss.evaluate.semi import FRACTIONS, Mode, score_semi
from msf_faiss.evaluate.setup import EvalSetup
from msf_faiss.evaluate.transfer import score_transfer

Family = Literal["knn", "linear", "semi", "transfer"]
FAMILIES: tuple[Family, ...] = get_args(Family)

KS, TEMPERATURES = (1, 20, 200), (0.07, 0.1)


def score_suite(
    setup: EvalSetup, encoder: EvalEncoder, *, families: Sequence[Family] = FAMILIES, fast: bool = False
) -> Iterator[Result]:
    """Yield the result of every evaluation as soon as it is ready. Features are computed once if they are cached.

    Raw pixels and the target encoder are scored with kNN only.

    Args:
        setup: weights and images; without held-out images, only kNN is possible.
        encoder: name of the encoder.
        families: evaluations to run.
        fast: linear layer without augmentation, no fine-tuning, and every fourth penalty.

    Raises:
        UserError: as the evaluations do.
    """
    if "knn" in families:
        yield score_knn(setup, encoder, ks=KS, temperatures=TEMPERATURES)
    if encoder in ("pixels", "target"):
        return
    if setup.test is None:
        if skipped := ", ".join(family for family in families if family != "knn"):
            setup.notify(f"{encoder}: skipping {skipped}, which need held-out images")
        return
    if "linear" in families:
        yield score_linear(setup, encoder, fast=fast)
    modes: tuple[Mode, ...] = ("linear",) if fast else ("linear", "fine-tune")
    if "semi" in families:
        for fraction in FRACTIONS:
            for mode in modes:
                yield score_semi(setup, encoder, labels=fraction, mode=mode, fast=fast)
    if "transfer" in families:
        yield score_transfer(setup, encoder, penalties=logistic.FAST_GRID if fast else logistic.GRID)
