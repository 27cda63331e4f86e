"""Adam (Kingma and Ba, 2015, ICLR) on flat vectors, as a function.

torch's optimizers load its compiler when they are made, a second, and with it modules that hold on
to the process group of torch.distributed that there is at that time: its threads then outlive it, and
a process may end with an abort.
"""

from torch import Tensor

EPSILON = 1e-8
Betas = tuple[float, float]


def adam(
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    bias: tuple[Tensor | float, Tensor | float],
    betas: Betas,
    moving: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where to go down a gradient, for a rate of one, and both running means after it.

    Args:
        mean: running mean of gradients.
        square: of their squares.
        gradient: the present one.
        bias: one minus each beta to the number of gradients so far, the present one included.
        betas: what the running means keep of themselves.
        moving: entries whose means this gradient enters.

    Example:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> adam(zero, zero, torch.tensor([4.0, -0.5]), (0.1, 0.01), (0.9, 0.99))[0]
        tensor([ 1., -1.])
    """
    mean = mean + moving * (1 - betas[0]) * (gradient - mean)
    square = square + moving * (1 - betas[1]) * (gradient * gradient - square)
    return mean / bias[0] / ((square / bias[1]).sqrt() + EPSILON), mean, square
