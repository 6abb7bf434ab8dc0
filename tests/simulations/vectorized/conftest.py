"""What the tests of vectorized sites share."""

from functools import partial

import pytest
import torch


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam divides a gradient by its own size: of one that is nothing but rounding (the bias of an attention) it makes a
    whole step. With a larger epsilon nothing is magnified, and rounding can be told from a mistake."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
