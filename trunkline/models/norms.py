"""The two norm layers a trunk can have: BatchNorm has to stay at its site; GroupNorm may be lent or stay (`TrunkSpec.norm`)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8  # of GroupNorm: what was measured; more groups see too few channels at small widths


class SiteNorm(nn.Module):
    """BatchNorm that belongs to one site: weight, bias and running statistics stay in its vault.

    Running statistics are data: averaged over sites they were worse than no federation at all, private ones clearly
    better (FedBN, Li et al. 2021, arXiv:2102.07623). Unlike torch's own it counts no batches (a number without
    dimensions does not survive every file format), and it takes a batch of one row.

    Shape:
        (batch, width, time) or (batch, width) -> the same.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # One value a channel has no spread of its own: lean on what was seen before, and learn nothing from it.
        learn = self.training and x.numel() > x.shape[1]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, learn, 0.1, 1e-5)


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He 2018, arXiv:1803.08494) over `width` channels: no statistics of the data, so it can be lent.

    With `norm = "private-group"` its weight and bias stay at the site instead: what each channel means may differ there,
    while no statistic of a batch is kept, which few rows could not give (the affine half of arXiv:2102.07623).

    At least two channels a group: a group of one in a window of one row would always be normalised to zero.
    """
    groups = max(count for count in range(1, GROUPS + 1) if width % count == 0 and (width // count > 1 or count == 1))
    return nn.GroupNorm(groups, width)
