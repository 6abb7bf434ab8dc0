"""The one piece UPGrad needs that its library leaves to a solver under another licence."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor
from torchjd.linalg import DualConeProjector, PSDMatrix

# Added to each squared length of 1. Rows exactly opposite would otherwise be balanced by numbers so large that their
# difference is rounding; with it a row is gone against by less than 1e-12 of all lengths.
RIDGE = 1e-14


class NonNegativeProjector(DualConeProjector):
    """Project J'u onto the dual cone of J's rows: the nearest vector that goes against no row.

    It is J'w where w minimises w'Gw under w >= u, G = JJ' (Quinton and Rey 2024, arXiv:2406.16232, Proposition 1). With
    w = u + z and G = A'A that is non-negative least squares: ||Az + Au|| over z >= 0 (Lawson and Hanson 1974, chapter 23).

    Rows are brought to length 1 first. That changes nothing in the solution, and a row a million times shorter than
    another is still seen in double precision. Rows may depend on each other: then w is one of several, and J'w is not.

    Shape:
        U (..., m) and G (m, m), symmetric and positive semi-definite -> (..., m), in G's dtype and on its device.
    """

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:  # noqa: N803  (the library's own names)
        wanted = U.detach().cpu().numpy().astype(np.float64)
        gramian = G.detach().cpu().numpy().astype(np.float64)
        weights = np.apply_along_axis(_project, -1, wanted, gramian)
        return torch.as_tensor(weights, dtype=G.dtype, device=G.device)


def _project(wanted: NDArray[np.float64], gramian: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.sqrt(np.clip(np.diag(gramian), 0.0, None))
    nonzero = length > 0.0  # a row of zeros is in nobody's way
    if not np.isfinite(gramian).all() or not nonzero.any():
        return wanted  # what is not finite is for the checks behind training, which name site and round
    cosines = gramian[np.ix_(nonzero, nonzero)] / np.outer(length[nonzero], length[nonzero])
    wish = wanted[nonzero] * length[nonzero]
    values, vectors = np.linalg.eigh(cosines)
    root = np.sqrt(np.clip(values, 0.0, None) + RIDGE)[:, None] * vectors.T  # cosines = root' root
    more, _ = nnls(root, -root @ wish, maxiter=100 * len(wish))
    out = wanted.copy()
    out[nonzero] = (wish + more) / length[nonzero]
    return out
