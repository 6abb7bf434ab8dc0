"""FedPer (Arivazhagan et al. 2019, arXiv:1912.00818): private stem and heads, trained jointly with the lent trunk."""

from trunkline.strategies.strategy import Averaging


class FedPer(Averaging):
    """One phase: stem, trunk and heads move together; only what run.toml lends is averaged."""
