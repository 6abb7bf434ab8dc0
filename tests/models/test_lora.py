"""Thin matrices beside a trunk's weights: what they start from, how little they learn, what is left of them."""

import numpy as np
import pytest
import torch

from trunkline.models.lora import LowRank, add_low_rank, merge_low_rank
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.plan import TrunkSpec

BODIES = [("tcn", 12), ("transformer", 12), ("mlp", None)]


def made(backbone: str, window: int | None) -> tuple[TrunkModel, torch.Tensor]:
    model = build_model(TrunkSpec(backbone=backbone, width=16), window=window, channels=3, tasks={}, seed=1)
    shape = (5, 3) if window is None else (5, 3, window)
    return model.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(2))


def moved(model: TrunkModel) -> None:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.trunk.modules():
            if isinstance(layer, LowRank):
                layer.up.copy_(0.3 * torch.randn(layer.up.shape, generator=random))


@pytest.mark.parametrize(("backbone", "window"), BODIES)
def test_before_anything_is_learnt_the_trunk_is_the_one_that_came(backbone: str, window: int | None) -> None:
    model, x = made(backbone, window)
    with torch.no_grad():
        before = model.embed(x)
        add_low_rank(model, seed=4)
        assert any(isinstance(layer, LowRank) for layer in model.trunk.modules())
        assert torch.allclose(model.embed(x), before, atol=1e-6)


@pytest.mark.parametrize(("backbone", "window"), BODIES)
def test_merging_keeps_what_the_trunk_computes_and_its_names(backbone: str, window: int | None) -> None:
    model, x = made(backbone, window)
    lent = model.share()
    add_low_rank(model, seed=4)
    moved(model)
    with torch.no_grad():
        adapted = model.embed(x)
        merge_low_rank(model)
        assert torch.allclose(model.embed(x), adapted, atol=1e-5)
    after = model.share()
    assert [(name, array.shape) for name, array in after.items()] == [
        (name, array.shape) for name, array in lent.items()
    ]
    assert after.digest() != lent.digest()


def test_a_weight_changes_by_no_more_than_the_rank_and_nothing_else_changes() -> None:
    model, _ = made("tcn", 12)
    lent = {name: np.array(array) for name, array in model.share().items()}
    add_low_rank(model, 2, seed=4)
    moved(model)
    merge_low_rank(model)
    ranks = {}
    for name, array in model.share().items():
        change = np.asarray(array, np.float64) - lent[name]
        if array.ndim >= 2 and "norms" not in name:
            ranks[name] = np.linalg.matrix_rank(change.reshape(len(change), -1), tol=1e-5)
        else:
            assert not change.any(), name
    assert max(ranks.values()) == 2
    assert min(ranks.values()) >= 1  # every Linear and Conv1d takes part


def test_only_the_thin_matrices_and_the_norms_learn() -> None:
    model, x = made("tcn", 12)
    whole = sum(parameter.numel() for parameter in model.trunk.parameters())
    add_low_rank(model, 2, seed=4)
    names = {name.rsplit(".", 1)[1] for name, _ in model.trunk.named_parameters()}
    assert names == {"up", "down"}
    assert sum(parameter.numel() for parameter in model.trunk.parameters()) < whole / 3
    model.embed(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.trunk.parameters())
