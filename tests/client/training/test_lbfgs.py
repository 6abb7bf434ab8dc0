"""L-BFGS on all rows: against the closed form, and without a trace in the random numbers of others."""

import numpy as np
import pytest
import torch
from torch import nn

from trunkline.client.training.lbfgs import fit_lbfgs, reseed
from trunkline.protocol.plan import Augment, LocalPlan


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_few_iterations_reach_the_least_squares_answer_at_any_scale(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=draw) * scale
    y = torch.randn(30, generator=draw)
    weight = nn.Parameter(torch.zeros(6))
    first = fit_lbfgs([weight], lambda: (x @ weight / scale - y).square().mean(), 25, seed=1)
    wanted = np.linalg.lstsq(x.numpy() / scale, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=1e-3, atol=1e-4)
    assert float(first) == pytest.approx(float(y.square().mean()))


def test_dropout_is_the_same_in_every_call_of_a_search() -> None:
    """With noise of its own in each call the search would stop at once or wander; with one mask it converges."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1)
    weight = nn.Parameter(torch.zeros(8))
    seen: list[float] = []

    def loss() -> torch.Tensor:
        value = (nn.functional.dropout(x, 0.3) @ weight - y).square().mean()
        seen.append(float(value.detach()))
        return value

    with torch.random.fork_rng(devices=[]):
        fit_lbfgs([weight], loss, 20, seed=3)
        best = min(seen)
        reseed(3, torch.device("cpu"))
        assert loss().item() == pytest.approx(best, rel=1e-5)


def test_no_label_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    fit_lbfgs([weight], lambda: torch.zeros(()), 5, seed=0)
    assert torch.equal(weight.detach(), torch.ones(3))


@pytest.mark.parametrize("changes", [{"balance": "famo"}, {"sampling": "balanced"}, {"augment": Augment(jitter=0.1)}])
def test_what_needs_batches_is_refused_with_whole_batches(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"leave `{next(iter(changes))}` out"):
        LocalPlan(optimizer="lbfgs", **changes)  # type: ignore[arg-type]
