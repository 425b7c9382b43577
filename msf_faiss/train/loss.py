"""The mean-shift loss, alone or in contrast to the other images of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_shift_loss(queries: Tensor, means: Tensor) -> Tensor:
    """Mean squared distance between each query and its neighbours, over neighbours and batch.

    MSF (Koohpayegani et al., ICCV 2021), section 3, equation 1 sums ||v - z_j||^2 over the k neighbours z_j; this
    function averages them, as the authors' code does. All vectors have unit norm, so

        (1/k) sum_j ||v - z_j||^2 = 2 - 2 <v, zbar>,    zbar = (1/k) sum_j z_j

    and the plain mean zbar, which does not have unit norm, is sufficient. With k = 1 this is the loss of BYOL.

    Args:
        queries: v, [B, D], unit norm, with gradients.
        means: zbar, [B, D], without gradients.

    Returns:
        A scalar between 0 and 4, in the wider of float32 and the inputs' dtypes.
    """
    return 2 - 2 * (queries * means).sum(dim=1).mean()


def contrastive_loss(queries: Tensor, means: Tensor, first: int, temperature: float) -> Tensor:
    """Cross entropy of finding each query's mean among those of all images of the batch, by cosine similarity.

        -log (exp(<v_i, n_i> / T) / sum_j exp(<v_i, n_j> / T)),    n_i = zbar_i / ||zbar_i||

    The numerator is mean shift; the denominator pushes a query away from the other means. With k = 1 this is the loss
    of MoCo v3 (Chen et al., ICCV 2021, algorithm 1) in one direction; NNCLR (Dwibedi et al., ICCV 2021, equation 3) has
    the nearest other embedding in place of the mean.

    Args:
        queries: v, [b, D], unit norm, with gradients: a part of the batch.
        means: zbar of the whole batch, [B, D], without gradients.
        first: row of `means` that belongs to the first query; the others follow.
        temperature: T.

    Returns:
        A scalar, the mean over the queries, in the wider of float32 and the inputs' dtypes.
    """
    logits = queries @ F.normalize(means, dim=1).T / temperature  # [b, B]
    return F.cross_entropy(logits, torch.arange(first, first + len(queries), device=logits.device))
