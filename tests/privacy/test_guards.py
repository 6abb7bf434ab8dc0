"""What a guard promises, on drawn updates, against the slow obvious way."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.loopback import arrays_in, federate, refusals_of, trunk_of
from trunkline.errors import ContractError
from trunkline.privacy.clip import Clip, norm_of
from trunkline.privacy.guards import at_server, at_site, at_sum, guards_of, objection, settings_that_meet, words
from trunkline.privacy.settings import GuardDemands, GuardSettings
from trunkline.protocol.arrays import Arrays

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)


@st.composite
def updates(draw: st.DrawFn) -> Arrays:
    """One to four arrays of the dtypes that may travel, from the smallest numbers to large ones."""
    arrays = {}
    for place in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from([np.float32, np.float64, np.float16]))
        most = 2.0**15 if dtype == np.float16 else 2.0**36
        numbers = st.floats(-most, most, width=np.dtype(dtype).itemsize * 8)  # type: ignore[arg-type]
        arrays[f"a{place}"] = draw(hnp.arrays(dtype, draw(SHAPES), elements=numbers))
    return Arrays(arrays)


BOUNDS = st.floats(1e-30, 1e6)


def by_hand(delta: Arrays) -> float:
    return math.sqrt(math.fsum(float(value) ** 2 for array in delta.values() for value in array.ravel()))


@given(delta=updates(), bound=BOUNDS)
def test_what_is_clipped_is_within_the_bound(delta: Arrays, bound: float) -> None:
    assert by_hand(Clip(bound).at_site(delta)) <= bound * (1 + 1e-12)


@given(delta=updates(), bound=BOUNDS)
def test_clipping_twice_is_clipping_once(delta: Arrays, bound: float) -> None:
    once = Clip(bound).at_site(delta)
    assert Clip(bound).at_site(once).digest() == once.digest()


@given(delta=updates(), bound=BOUNDS)
def test_each_element_is_scaled_by_one_factor(delta: Arrays, bound: float) -> None:
    norm = by_hand(delta)
    factor = min(1.0, bound / norm) if norm else 1.0
    for name, array in Clip(bound).at_site(delta).items():
        assert array.dtype == delta[name].dtype and array.shape == delta[name].shape
        if factor == 1.0 and norm < bound:
            assert array.tobytes() == delta[name].tobytes()
        coarse = np.finfo(array.dtype)
        half = any(one.dtype == np.float16 for one in delta.values())
        for got, was in zip(array.ravel().tolist(), delta[name].ravel().tolist(), strict=True):
            # the coarsest dtype of the update decides how far below the bound is aimed: among the smallest numbers of
            # float16, where a factor near 1 changes nothing, it may be far
            slack = abs(was * factor) * (1.0 if half else 0.02)
            assert abs(got - was * factor) <= slack + 64 * float(coarse.smallest_subnormal)


@given(delta=updates(), bound=BOUNDS)
def test_the_server_takes_exactly_what_a_site_may_send(delta: Arrays, bound: float) -> None:
    guard = Clip(bound)
    assert guard.at_server(guard.at_site(delta)).digest() == guard.at_site(delta).digest()
    if by_hand(delta) > bound * 1.0001:
        with pytest.raises(ContractError, match="L2 norm"):
            guard.at_server(delta)


def test_an_update_with_nan_is_left_for_the_server_to_name() -> None:
    delta = Arrays({"a": np.array([np.nan, 3.0], np.float32)})
    assert Clip(1.0).at_site(delta).digest() == delta.digest()


def test_guards_have_names_with_their_parameters() -> None:
    assert words(GuardSettings(clip_norm=10.0)) == ("clip(10)",)
    assert words(GuardSettings(clip_norm=0.25)) == ("clip(0.25)",)
    assert words(GuardSettings()) == () == guards_of(GuardSettings())


def test_guards_are_applied_in_order_and_undone_in_reverse() -> None:
    class Mark:
        def __init__(self, number: int) -> None:
            self.number = number

        def words(self) -> str:
            return f"mark({self.number})"

        def at_site(self, delta: Arrays) -> Arrays:
            return Arrays({name: array * 10 + self.number for name, array in delta.items()})

        def at_server(self, delta: Arrays) -> Arrays:
            return Arrays({name: (array - self.number) / 10 for name, array in delta.items()})

    two = (Mark(1), Mark(2))
    zero = Arrays({"a": np.zeros(1)})
    assert at_site(two, zero)["a"].tolist() == [12.0]
    assert at_server(two, at_site(two, zero))["a"].tolist() == [0.0]


def test_every_update_of_a_guarded_run_is_within_the_bound(plants: list[Path], tmp_path: Path) -> None:
    free = federate(plants, tmp_path / "free")
    kept = federate(plants, tmp_path / "kept", guards={"clip_norm": 0.05})
    norms = {
        out: [norm_of(Arrays(arrays_in(content))) for kind, _, content in grid.up if kind == "train"]
        for out, grid in (("free", free), ("kept", kept))
    }
    assert min(norms["free"]) > 0.05, "the bound must matter here"
    assert all(0.0499 < norm <= 0.05 for norm in norms["kept"])
    assert refusals_of(tmp_path / "kept") == {1: {}, 2: {}, 3: {}}
    assert trunk_of(tmp_path / "kept").digest() != trunk_of(tmp_path / "free").digest()


def test_a_site_that_does_not_clip_is_refused_by_name(plants: list[Path], tmp_path: Path) -> None:
    from flwr.app import Message

    from trunkline.flower.records import open_records, to_records

    def tamper(message: Message, honest: object) -> Message:
        reply: Message = honest()  # type: ignore[operator]
        if message.metadata.message_type != "train":
            return reply
        arrays, header, metrics = open_records(reply.content)
        return Message(to_records({n: 1.5 * a for n, a in arrays.items()}, header, metrics), reply_to=message)

    federate(plants, tmp_path, tamper={3: tamper}, guards={"clip_norm": 0.05})
    for refused in refusals_of(tmp_path).values():
        ((site, cause),) = refused.items()
        assert site == plants[1].name and "clip(0.05)" in cause and "did not clip" in cause


def test_a_simulation_with_a_guard_trains_every_site_by_itself_and_ends_with_the_same_bytes(
    plants: list[Path], tmp_path: Path
) -> None:
    """Stacks know no guard: a run with one falls back to the path that does."""
    from trunkline.config.run import parse_run
    from trunkline.simulations.factories import write_sites
    from trunkline.simulations.simulate import simulate

    many = sorted(write_sites("synthetic", tmp_path / "many", groups=4, plants=8))
    settings = {
        "name": "guarded", "rounds": 2, "seed": 5, "trunk": {"width": 16}, "training": {"steps": 2, "batch_size": 32},
        "report": {"baseline": False}, "cohort": {"min_sites": 1}, "guards": {"clip_norm": 0.02},
    }  # fmt: skip
    simulate(parse_run(dict(settings), "test"), many, tmp_path / "simulated", workers=0)
    federate(many, tmp_path / "loop", **settings)
    assert trunk_of(tmp_path / "simulated").digest() == trunk_of(tmp_path / "loop").digest()


def test_a_guard_is_one_file_and_one_line_of_the_table(plants: list[Path], tmp_path: Path) -> None:
    """Applied at the site, the server and the sum; named in the contract and on the release's card."""
    folders = [Path(shutil.copytree(plant, tmp_path / "sites" / plant.name)) for plant in plants[:2]]
    program = [sys.executable, "-m", "tests.privacy.toy_guard", str(tmp_path / "out"), *map(str, folders)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["calls"]["site"] == [told["arrays"]] * 2
    assert told["calls"]["sum"] == [sorted(folder.name for folder in folders)]
    assert len(told["calls"]["server"]) == 4  # where each reply leaves, and where it arrives
    assert told["contract"] == "toy(0.25)"
    assert told["card"] == [{"name": "toy", "parameters": {"share": 0.25}}]
    assert not told["moved"], "the sum was replaced before it moved the trunk"


def test_a_setting_of_no_guard_is_named_with_the_side_to_update() -> None:
    with pytest.raises(ContractError, match="`noise`, which this Trunkline does not know"):
        guards_of({"noise": 1.0})
    with pytest.raises(ContractError, match=r"guard setting `clip_norm`"):
        guards_of({"clip_norm": -1.0})


def test_a_policy_that_demands_a_guard_accepts_the_settings_that_meet_it() -> None:
    for demands in (GuardDemands(), GuardDemands(guards=("clip",)), GuardDemands(guards=("clip",), max_clip_norm=2.0)):
        assert objection(settings_that_meet(demands), demands) == ""
    assert "demands the guard" in objection({}, GuardDemands(guards=("clip",)))


def test_the_mean_of_clipped_updates_stays_as_it_is() -> None:
    total = Arrays({"a": np.ones(3)})
    assert at_sum(guards_of({"clip_norm": 1.0}), total, ["plant-1"]) is total
