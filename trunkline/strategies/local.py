"""No exchange at all: every site trains alone. The baseline every other strategy has to beat."""

from trunkline.strategies.strategy import Averaging


class Local(Averaging):
    """Nothing is lent, so nothing comes back; rounds only pace the learning-rate schedule."""

    def lends(self, named: tuple[str, ...]) -> tuple[str, ...]:
        return ()
