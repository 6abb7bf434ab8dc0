"""All training rows at once, by curvature: for sites of some hundred rows, where a batch is everything there is."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def reseed(seed: int, where: torch.device) -> None:
    """Start the random numbers of `where` afresh. `torch.manual_seed` also queues a call for every accelerator that is not
    there yet, with a formatted stack each time, which takes longer than a small step of training."""
    torch.default_generator.manual_seed(seed)
    if where.type == "cuda":
        torch.cuda.manual_seed(seed)


def fit_lbfgs(moving: Sequence[Tensor], loss_of: Callable[[], Tensor], iterations: int, seed: int) -> Tensor:
    """L-BFGS with a strong Wolfe line search (Nocedal and Wright 2006, chapter 7), in place.

    Where AdamW needs a decaying rate and hundreds of steps to settle, this reaches float32's last digits of a small smooth
    problem in some ten iterations, from any scale of the weights. Learning rate, weight decay and clipping do not apply.

    Args:
        loss_of: the loss on all rows; called several times an iteration.
        seed: of the dropout, the same in every call: a line search must not meet a loss that moves by itself.

    Returns:
        The loss before the first iteration, detached.
    """
    optimiser = torch.optim.LBFGS(
        list(moving), max_iter=iterations, max_eval=4 * iterations, history_size=min(iterations, 20),
        tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        reseed(seed, moving[0].device)
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of()
        if loss.requires_grad:  # rows without a single label move nothing
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    first: Tensor = optimiser.step(closure)  # type: ignore[no-untyped-call]
    return first
