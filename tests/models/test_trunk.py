"""The partition: what a model lends, what it keeps, and that the two never mix."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.samples import batch, labels_of, site, spec_of, tasks_of
from trunkline.errors import ConfigError, ContractError, SensorMismatch, StorageError
from trunkline.models.backbones import BACKBONES
from trunkline.models.backbones.backbone import Backbone
from trunkline.models.trunk import TrunkModel, build_model, first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.plan import TrunkSpec

LENDS = [
    lend
    for size in range(4)
    for lend in itertools.combinations(("trunk", "stem", "head.rul"), size)
] + [("trunk", "heads"), ("stem", "trunk", "head.fault", "head.rul")]  # fmt: skip
SPECS = [spec_of(backbone, norm, width=12) for backbone in BACKBONES for norm in ("group", "private", "private-group")]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.backbone}-{spec.norm}")
every_lend = pytest.mark.parametrize("lend", LENDS, ids=lambda lend: "+".join(lend) or "nothing")


def trained(model: TrunkModel, spec: TrunkSpec) -> TrunkModel:
    """The model after it saw data, so that running statistics and every parameter differ from their start."""
    model(*batch(spec, seed=9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


def state_of(model: TrunkModel) -> list[bytes]:
    return sorted(tensor.numpy().tobytes() for tensor in model.state_dict().values())


@every_spec
@every_lend
def test_what_is_lent_and_what_is_kept_are_the_whole_model_exactly_once(spec: TrunkSpec, lend: tuple[str, ...]) -> None:
    model = trained(site(spec), spec)
    share, private = model.share(lend), model.private(lend)
    assert not set(share) & set(private)
    assert sorted(array.tobytes() for array in (*share.values(), *private.values())) == state_of(model)


@every_spec
@every_lend
def test_changing_every_tensor_that_is_not_lent_changes_no_shared_byte(spec: TrunkSpec, lend: tuple[str, ...]) -> None:
    model = trained(site(spec), spec)
    before = model.share(lend).digest()
    lent = {id(tensor) for module in model.lent(lend).values() for tensor in module.parameters()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in lent:
                tensor.mul_(-3.0).add_(1e6)
    assert model.share(lend).digest() == before


@every_spec
@every_lend
def test_what_one_site_lends_another_adopts_and_nothing_else_moves(spec: TrunkSpec, lend: tuple[str, ...]) -> None:
    giver, taker = trained(site(spec, seed=1), spec), site(spec, seed=2)
    kept = {name: array.tobytes() for name, array in taker.private(lend).items()}
    taker.adopt(giver.share(lend), lend)
    assert taker.share(lend).digest() == giver.share(lend).digest()
    assert {name: array.tobytes() for name, array in taker.private(lend).items()} == kept


@every_spec
def test_a_site_restored_from_its_vault_answers_as_before(spec: TrunkSpec) -> None:
    model, other = trained(site(spec, seed=1), spec).eval(), site(spec, seed=2).eval()
    other.adopt(model.share())
    other.restore(model.private())
    there, here = other(*batch(spec)), model(*batch(spec))
    assert all(torch.equal(there[task], here[task]) for task in here)


@every_spec
def test_the_names_say_what_each_array_is(spec: TrunkSpec) -> None:
    model = site(spec)
    assert all(name.startswith("trunk.") for name in model.share())
    normed = len(model.norms) > 0
    assert any(name.startswith("trunk.norms.0.") for name in model.share()) == (normed and spec.norm == "group")
    assert any(name.startswith("norms.0.") for name in model.private()) == (normed and spec.norm != "group")
    parts = {"head"} if spec.columns else {"stem", "head"}
    assert {name.split(".")[0] for name in model.share(("stem", "heads"))} == parts
    assert all(array.ndim > 0 for array in (*model.share().values(), *model.private().values()))


@every_spec
def test_nothing_lent_holds_a_buffer_and_private_norms_are_never_lent(spec: TrunkSpec) -> None:
    model = trained(site(spec), spec)
    everything = model.lent(("trunk", "stem", "heads"))
    assert not [buffer for module in everything.values() for buffer in module.buffers()]
    norms = {id(module) for module in model.norms.modules()}
    lent = {id(module) for part in everything.values() for module in part.modules()}
    assert (norms <= lent) if spec.norm == "group" else not (norms & lent)


def test_a_shared_array_is_a_copy_of_its_parameter() -> None:
    model = site(SPECS[0])
    share = model.share()
    before = share.digest()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert share.digest() == before
    model.adopt(share)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert share.digest() == before


def test_the_order_of_lend_and_of_tasks_changes_nothing() -> None:
    forward, backward = (site(SPECS[0], tasks=tasks_of(*names)) for names in (("rul", "fault"), ("fault", "rul")))
    assert forward.share(("heads", "trunk")).digest() == backward.share(("trunk", "heads")).digest()


def test_a_head_a_site_does_not_have_lends_nothing() -> None:
    model = site(SPECS[0])
    assert list(model.share(("trunk", "head.leak"))) == list(model.share())


def test_a_misspelt_part_is_refused_rather_than_skipped() -> None:
    with pytest.raises(ConfigError, match=r"'trnk'.*'trunk', 'stem'"):
        site(SPECS[0]).share(("trnk",))
    with pytest.raises(ConfigError, match=r"'trunk.norms'"):
        site(SPECS[0]).share(("trunk.norms",))


def broken(change: Callable[[dict[str, np.ndarray]], object]) -> dict[str, np.ndarray]:
    arrays = {name: np.array(array) for name, array in site(SPECS[0]).share().items()}
    change(arrays)
    return arrays


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (broken(lambda a: a.pop("trunk.out.weight")), r"`trunk\.out\.weight` should be there"),
        (broken(lambda a: a.update({"stem.values.weight": np.zeros(3, np.float32)})), r"`stem\.values\.weight` is not"),
        (broken(lambda a: a.update({"trunk.out.bias": np.zeros(1, np.float32)})), r"shape \(12,\)\. Found \(1,\)"),
        (broken(lambda a: a.update({"trunk.out.bias": np.zeros(12)})), r"`trunk\.out\.bias`.*float32\. Found float64"),
        (broken(lambda a: a.update({"trunk.out.bias": np.zeros(12, np.float16)})), r"float32\. Found float16"),
    ],
    ids=["missing", "extra", "broadcastable", "double", "half"],
)
def test_what_is_not_exactly_the_trunk_is_refused_whole(arrays: dict[str, np.ndarray], words: str) -> None:
    model = site(SPECS[0], seed=1)
    before = model.share().digest()
    with pytest.raises(ContractError, match=words):
        model.adopt(arrays)
    assert model.share().digest() == before


def test_a_vault_of_another_model_is_refused_whole() -> None:
    four, three = site(SPECS[0], channels=4), site(SPECS[0], channels=3)
    before = state_of(three)
    with pytest.raises(
        StorageError, match=r"`stem\.values\.weight` should have shape \(12, 3, 1\)\. Found \(12, 4, 1\)"
    ):
        three.restore(four.private())
    assert state_of(three) == before
    with pytest.raises(StorageError, match=r"`norms\.0\.weight` should be there"):
        site(TrunkSpec(backbone="tcn", norm="private", width=12)).restore(three.private())


def test_a_trunk_with_a_buffer_is_refused_at_construction() -> None:
    with pytest.raises(ContractError, match=r"`trunk\.norms`.*`0\.running_mean`.*norm = \"private\""):
        TrunkModel(nn.Identity(), BACKBONES["tcn"]("small", 12, 0.0), nn.ModuleList([nn.BatchNorm1d(12)]),
                   nn.ModuleDict(), lend_norms=True)  # fmt: skip


sites = st.fixed_dictionaries(
    {
        "channels": st.integers(1, 200),
        "tasks": st.lists(st.sampled_from(["rul", "failing", "fault", "stage"]), unique=True).map(
            lambda names: tasks_of(*names) if names else {}
        ),
        "width": st.sampled_from([None, 4, 7, 16]),
        "size": st.sampled_from(["small", "base"]),
        "backbone": st.sampled_from(sorted(BACKBONES)),
        "norm": st.sampled_from(["group", "private", "private-group"]),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=30, deadline=None)
@given(sites)
def test_every_site_of_a_run_starts_from_the_centre_s_first_trunk(drawn: dict[str, object]) -> None:
    spec = spec_of(**{key: drawn[key] for key in ("width", "size", "backbone", "norm", "channels")})  # type: ignore[arg-type]
    model = site(spec, channels=drawn["channels"], tasks=drawn["tasks"], seed=drawn["seed"])  # type: ignore[arg-type]
    assert model.share().digest() == first_trunk(spec, drawn["seed"]).digest()  # type: ignore[arg-type]


def test_one_more_head_or_channel_changes_no_other_module() -> None:
    spec = SPECS[0]
    one, more = site(spec, tasks=tasks_of("rul")), site(spec, tasks=tasks_of("fault", "rul", "stage"))
    assert one.share(("trunk", "stem", "head.rul")).digest() == more.share(("trunk", "stem", "head.rul")).digest()
    assert (
        one.share(("trunk", "heads")).digest()
        == site(spec, channels=9, tasks=tasks_of("rul")).share(("trunk", "heads")).digest()
    )
    assert one.share().digest() != site(spec, tasks=tasks_of("rul"), seed=1).share().digest()


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    site(SPECS[0])
    first_trunk(SPECS[0], 3)
    assert torch.equal(torch.rand(3), expected)


@every_spec
def test_the_parts_that_train_are_every_parameter_exactly_once(spec: TrunkSpec) -> None:
    model = site(spec)
    parts = {part: model.parameters_of(part) for part in ("stem", "trunk", "heads")}  # type: ignore[arg-type]
    assert sorted(id(one) for some in parts.values() for one in some) == sorted(map(id, model.parameters()))
    assert {id(one) for one in model.norms.parameters()} <= {id(one) for one in parts["trunk"]}


WINDOWS = [name for name, backbone in BACKBONES.items() if backbone.reads == "windows"]


@pytest.mark.parametrize(
    ("backbone", "window", "words"),
    [
        ("mlp", 30, rf"windows of 30 rows.*Backbones that fit: {', '.join(WINDOWS)}"),
        ("tcn", None, r"single rows.*Backbones that fit: mlp"),
        ("tnc", 30, rf"'tnc'; did you mean 'tcn'\?.*Known backbones: {', '.join([*WINDOWS, 'mlp'])}"),
    ],
)
def test_a_backbone_that_cannot_read_the_samples_says_which_can(backbone: str, window: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(TrunkSpec(backbone=backbone), window=window, channels=3, tasks=tasks_of("rul"), seed=0)


@every_spec
def test_models_stacked_for_vmap_answer_and_learn_as_alone(spec: TrunkSpec) -> None:
    """Many simulated sites are trained in one batched call; that must not change what any of them learns."""
    spec = spec.model_copy(update={"dropout": 0.0})
    tasks = tasks_of()
    models = [site(spec, tasks=tasks, seed=seed) for seed in (1, 2)]
    inputs = [batch(spec, seed=seed) for seed in (1, 2)]
    labels = {
        name: torch.from_numpy(np.stack([labels_of(task, 5, seed) for seed in (1, 2)])) for name, task in tasks.items()
    }
    for truth in labels.values():
        truth[0, 2] = truth[1, 4] = float("nan")

    def loss_of(outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
        return torch.stack([task.loss(outputs[name], truth[name]) for name, task in tasks.items()]).sum()

    def stacked_loss(
        p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, c: Tensor, y: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = torch.func.functional_call(models[0], (p, b), (x, c))
        return loss_of(outputs, y), outputs

    parameters, buffers = torch.func.stack_module_state(models)
    parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    x, codes = (torch.stack(some) for some in zip(*inputs, strict=True))
    gradient, outputs = torch.func.vmap(torch.func.grad(stacked_loss, has_aux=True))(
        parameters, buffers, x, codes, labels
    )
    for place, model in enumerate(models):
        alone = model(*inputs[place])
        loss_of(alone, {name: column[place] for name, column in labels.items()}).backward()
        for name, output in alone.items():
            torch.testing.assert_close(outputs[name][place], output.detach(), atol=1e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            torch.testing.assert_close(gradient[name][place], parameter.grad, atol=1e-5, rtol=1e-4)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name][place], buffer, atol=1e-5, rtol=1e-5)


def test_the_default_trunk_is_as_small_as_promised() -> None:
    assert sum(array.size for array in first_trunk(TrunkSpec(), 0).values()) < 40_000  # 150 kB a round and site


def test_shared_arrays_are_what_the_contract_can_name() -> None:
    share = site(SPECS[0]).share()
    assert isinstance(share, Arrays)
    assert {array.dtype.name for array in share.values()} == {"float32"}


def test_every_backbone_in_the_table_says_what_it_reads_and_its_sizes() -> None:
    for name, backbone in BACKBONES.items():
        assert issubclass(backbone, Backbone), name
        assert backbone.reads in ("windows", "rows"), name
        assert set(backbone.sizes) == {"small", "base"}, name
        assert backbone.sizes["small"].width < backbone.sizes["base"].width, name


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "linear"])
def test_private_group_norms_compute_as_lent_ones_and_stay_home(backbone: str) -> None:
    lent, kept = (site(spec_of(backbone, norm, width=12)).eval() for norm in ("group", "private-group"))
    sample = batch(spec_of(backbone))
    for name, output in lent(*sample).items():
        assert torch.equal(output, kept(*sample)[name])
    beyond = set(lent.share()) - set(kept.share())
    assert beyond
    assert all(name.startswith("trunk.norms.") for name in beyond)
    assert {name.removeprefix("trunk.") for name in beyond} <= set(kept.private())
    assert set(kept.share()) < set(lent.share())


def test_a_trunk_without_stem_refuses_a_site_with_other_columns() -> None:
    spec = spec_of("linear", channels=3, width=2)
    assert not list(site(spec).stem.parameters())
    with pytest.raises(SensorMismatch, match="reads 3 number columns as they are; this site has 4 and 0"):
        site(spec, channels=4)
    with pytest.raises(SensorMismatch, match="3 and 1 categorical"):
        build_model(spec, window=None, channels=3, categories=(5,), tasks=tasks_of("rul"), seed=0)


def test_the_linear_trunk_is_its_matrix() -> None:
    spec = spec_of("linear", channels=3, width=2)
    model, (x, codes) = site(spec), batch(spec)
    matrix = torch.from_numpy(model.share()["trunk.matrix.weight"].copy())
    torch.testing.assert_close(model.embed(x, codes), x @ matrix.T)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"backbone": "linear"}, "needs `columns`"),
        ({"backbone": "mlp", "columns": 3}, "no other backbone takes it"),
        ({"backbone": "mlp", "width": 2}, "`width` of backbone 'mlp' is at least 4"),
    ],
)
def test_a_trunk_that_cannot_be_meant_is_refused_where_it_is_written(table: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrunkSpec(**table)  # type: ignore[arg-type]
