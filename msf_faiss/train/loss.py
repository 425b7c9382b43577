"""The mean-shift loss."""

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
