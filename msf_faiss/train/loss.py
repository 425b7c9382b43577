"""The mean-shift loss."""

from __future__ import annotations

from torch import Tensor


def mean_shift_loss(queries: Tensor, means: Tensor) -> Tensor:
    """Mean squared distance of each query to its neighbours, averaged over neighbours and batch.

    MSF (ICCV 2021), section 3, equation 1: the sum over the k neighbours z_j of ||v - z_j||^2. Like the authors' code
    this takes their average where the paper writes a sum. All vectors have unit norm, so

        (1/k) sum_j ||v - z_j||^2 = 2 - 2 <v, zbar>,    zbar = (1/k) sum_j z_j

    and only the plain mean zbar, not of unit norm itself, is needed. With k = 1 this is the loss of BYOL.

    Args:
        queries: v, [B, D], unit norm, with gradients.
        means: zbar, [B, D], without gradients.

    Returns:
        A scalar between 0 and 4, in the wider of float32 and the inputs' dtypes.
    """
    return 2 - 2 * (queries * means).sum(dim=1).mean()
