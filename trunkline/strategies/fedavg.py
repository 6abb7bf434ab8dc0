"""FedAvg (McMahan et al. 2017, arXiv:1602.05629): everything is lent and averaged.

The baseline where sensors and tasks are equal; sites whose arrays differ in shape cannot take part in it.
"""

from trunkline.strategies.strategy import Averaging


class FedAvg(Averaging):
    """Lend stem, trunk and heads, whatever run.toml names."""

    def lends(self, named: tuple[str, ...]) -> tuple[str, ...]:
        return ("trunk", "stem", "heads")
