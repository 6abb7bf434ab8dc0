"""FedAdam (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2): the mean update is a gradient for Adam at the server."""

from trunkline.strategies.adaptive import Adaptive


class FedAdam(Adaptive):
    """Adam on the shared arrays; options as in `Adaptive`."""
