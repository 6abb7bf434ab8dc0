"""FedYogi (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2): FedAdam whose memory of squares grows slowly."""

import numpy as np

from trunkline.strategies.adaptive import Adaptive, Numbers


class FedYogi(Adaptive):
    """Yogi's square moves by at most (1 - beta2) times the new one, up or down, whatever it was before.

    After a round of large updates Adam's square fades within some tens of rounds and the step grows again; Yogi's comes
    down no faster than small updates allow (Zaheer et al. 2018, NeurIPS). Options as in `Adaptive`.
    """

    def remember(self, square: Numbers, delta: Numbers) -> Numbers:
        new = np.square(delta)
        return square - (1 - self.beta2) * new * np.sign(square - new)
