"""Any window, any number of sensors, any batch: the same shape out, finite, and learnable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.samples import batch, site, spec_of
from trunkline.models.backbones import BACKBONES
from trunkline.models.norms import SiteNorm, group_norm
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.plan import TrunkSpec

WINDOWS = [name for name, backbone in BACKBONES.items() if backbone.reads == "windows"]
norms = st.sampled_from(["group", "private", "private-group"])


@settings(max_examples=40, deadline=None)
@given(
    backbone=st.sampled_from(sorted(BACKBONES)),
    norm=norms,
    width=st.sampled_from([None, 4, 5, 13, 32]),
    channels=st.sampled_from([1, 2, 17, 200]),
    time=st.sampled_from([1, 2, 3, 7, 64, 130]),
    size=st.sampled_from([1, 2, 5]),
    training=st.booleans(),
    silent=st.booleans(),
)
def test_any_site_gives_one_finite_row_a_sample(
    backbone: str, norm: str, width: int | None, channels: int, time: int, size: int, training: bool, silent: bool
) -> None:
    spec = spec_of(backbone, norm, width=width, channels=channels)
    model = site(spec, channels=channels).train(training)
    x, codes = batch(spec, size, channels, time)
    if silent:
        x[0] = float("nan")  # every sensor of a sample, the whole window long
        x[:, 0] = float("nan")  # and one sensor of every sample
    outputs = model(x, codes)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {"rul": (size, 1), "fault": (size, 3)}
    assert model.embed(x, codes).shape == (size, model.trunk.width)
    torch.stack([output.square().sum() for output in outputs.values()]).sum().backward()
    assert all(output.isfinite().all() for output in outputs.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("norm", ["group", "private"])
def test_half_precision_answers_like_full_precision(backbone: str, norm: str) -> None:
    spec = spec_of(backbone, norm)
    model = site(spec).eval()
    exact = model(*batch(spec))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*batch(spec))
    for name, output in exact.items():
        torch.testing.assert_close(rough[name].float(), output, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("size", ["small", "base"])
def test_no_sample_of_a_batch_sees_another(backbone: str, size: str) -> None:
    spec = spec_of(backbone, size=size)
    model = site(spec).eval()
    x, codes = batch(spec)
    together = model.embed(x, codes)
    alone = torch.cat([model.embed(x[i : i + 1], codes[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", WINDOWS)
@pytest.mark.parametrize("time", [1, 5, 30])
def test_every_row_of_a_window_reaches_the_answer_and_order_matters(backbone: str, time: int) -> None:
    model = site(spec_of(backbone)).eval()
    x = batch(spec_of(backbone), time=time)[0].requires_grad_()
    model.embed(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(dim=(0, 1)) > 0).all()
    if time > 1:
        assert (model.embed(x) - model.embed(x.flip(-1))).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", WINDOWS)
def test_where_a_window_stands_now_weighs_more_than_where_it_began(backbone: str) -> None:
    model = site(spec_of(backbone)).eval()
    x = batch(spec_of(backbone), size=20, time=64)[0].requires_grad_()
    model.embed(x).square().sum().backward()
    assert x.grad is not None
    clearly = 1.3 if backbone == "tcn-stats" else 3.0  # its statistics are over the whole window on purpose
    assert x.grad[..., -4:].abs().mean() > clearly * x.grad[..., :4].abs().mean()


def test_transformer_knows_where_in_the_window_a_patch_lies() -> None:
    """Without positions a mean over tokens cannot tell two early patches apart."""
    model = site(spec_of("transformer")).eval()
    x = batch(spec_of("transformer"), time=16)[0]
    swapped = torch.cat([x[..., 4:8], x[..., :4], x[..., 8:]], dim=-1)
    assert (model.embed(x) - model.embed(swapped)).abs().max() > 1e-4


def learns(model: TrunkModel, spec: TrunkSpec) -> tuple[float, float]:
    """Loss before and after a few steps towards something that is in the input."""
    x, codes = batch(spec, size=64)
    truth = x[:, 0].reshape(64, -1)[:, -4:].mean(dim=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = (model(x, codes)["rul"][:, 0] - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("norm", ["group", "private"])
def test_loss_falls_on_a_learnable_toy(backbone: str, norm: str) -> None:
    spec = spec_of(backbone, norm, width=16, dropout=0.0)
    before, after = learns(site(spec), spec)
    assert after < 0.5 * before


@settings(deadline=None)
@given(width=st.integers(4, 1024))
def test_group_norm_never_erases_what_it_normalises(width: int) -> None:
    norm = group_norm(width)
    assert width % norm.num_groups == 0
    assert norm.num_groups <= 8
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width))  # one row: the hardest case
    assert norm(x).abs().max() > 0.1


def test_private_norm_equals_batch_norm_where_that_is_defined() -> None:
    ours, oracle = SiteNorm(6), torch.nn.BatchNorm1d(6)
    for shape in ((5, 6, 4), (3, 6), (1, 6, 9)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        assert torch.equal(ours(x), oracle(x))
    assert torch.equal(ours.running_mean, oracle.running_mean)
    assert torch.equal(ours.running_var, oracle.running_var)
    ours.eval(), oracle.eval()
    assert torch.equal(ours(x), oracle(x))


def test_private_norm_learns_nothing_from_a_single_value() -> None:
    norm = SiteNorm(6)
    norm(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    before = norm.running_var.clone()
    out = norm(torch.randn(1, 6, 1, generator=torch.Generator().manual_seed(1)))
    assert out.isfinite().all()
    assert out.abs().max() > 0
    assert torch.equal(norm.running_var, before)
