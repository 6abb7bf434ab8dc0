"""Pooled rows: one model on everybody's data. The other bound; it exists in simulation only, where rows may be pooled."""

from typing import ClassVar

from trunkline.strategies.fedavg import FedAvg


class Central(FedAvg):
    """FedAvg's model, trained on the concatenated training windows, each scaled by its own site."""

    pooled: ClassVar[bool] = True
