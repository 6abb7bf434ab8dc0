"""What crosses the wire opens to what was packed, and anything else is refused by name."""

import gc
import io
import json
import tracemalloc
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

import trunkline
from trunkline.errors import ContractError, DataError, StorageError
from trunkline.flower import (
    HEADER_LIMIT,
    LoopbackGrid,
    app_bytes,
    app_digest,
    error_site,
    fab_digest,
    open_records,
    reason_of,
    to_records,
)

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower with pathspec 1.x
DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool", ">f4"])
ARRAYS = drawn.arrays(DTYPES, drawn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


@given(st.dictionaries(st.text(max_size=20), ARRAYS, max_size=4), st.text(max_size=50), st.booleans())
@settings(deadline=None)
def test_what_is_packed_is_what_is_opened(arrays: dict[str, Any], header: str, turned: bool) -> None:
    arrays = {name: array.T if turned else array for name, array in arrays.items()}
    found, text, metrics = open_records(to_records(arrays, header, {"loss": 0.25}))
    assert list(found) == list(arrays) and text == header and metrics == {"loss": 0.25}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable


@given(ARRAYS, st.booleans())
@settings(deadline=None)
def test_the_bytes_of_an_array_are_those_that_numpy_and_flower_write(array: np.ndarray, turned: bool) -> None:
    array = array.T if turned else array
    packed = to_records({"w": array}, "{}").array_records["arrays"]["w"]
    stream = io.BytesIO()
    np.save(stream, array)
    assert packed.data == stream.getvalue()
    assert packed == Array(array)


def test_an_opened_message_is_freed_as_soon_as_nobody_uses_it() -> None:
    gc.disable()
    try:
        content = to_records({"w": np.zeros(3)}, "{}")
        open_records(content)
        left = weakref.ref(content)
        del content
        assert left() is None
    finally:
        gc.enable()


def claimed(
    data: bytes, shape: tuple[int, ...] = (2,), dtype: str = "float32", stype: str = "numpy.ndarray"
) -> RecordDict:
    content = to_records({}, "{}")
    content["arrays"] = ArrayRecord({"w": Array(dtype, shape, stype, data)})
    return content


def npy(array: Any, **change: Any) -> bytes:
    """A numpy file whose header says something else than its body."""
    stream = io.BytesIO()
    head = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **change}
    np.lib.format.write_array_header_1_0(stream, head)
    return stream.getvalue() + array.tobytes()


PAIR = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (RecordDict(), "expected exactly"),
        (RecordDict({**to_records({}, "{}"), "more": MetricRecord()}), "more: MetricRecord"),
        (RecordDict({**to_records({}, "{}"), "arrays": ConfigRecord()}), "arrays: ConfigRecord"),
        (RecordDict({**to_records({}, "{}"), "header": ConfigRecord({"json": b"{}"})}), "json: bytes"),
        (RecordDict({**to_records({}, "{}"), "header": ConfigRecord({"json": "", "x": 1})}), "x: int"),
        (RecordDict({**to_records({}, "{}"), "header": ConfigRecord({"json": " " * (HEADER_LIMIT + 1)})}), "header"),
        (RecordDict({**to_records({}, "{}"), "metrics": MetricRecord({"a": [1.0, 2.0]})}), "`a` is a list"),
        (claimed(npy(PAIR), stype="pickle"), "serialised as 'pickle'"),
        (claimed(b"not numpy"), "does not begin like a numpy array"),
        (claimed(b""), "does not begin like a numpy array"),
        (claimed(npy(PAIR, descr="|O"), dtype="object"), "only plain numbers"),
        (claimed(npy(PAIR, descr="<M8[s]"), dtype="datetime64[s]"), "only plain numbers"),
        (claimed(npy(PAIR), shape=(3,)), "must agree"),
        (claimed(npy(PAIR), dtype="float64"), "must agree"),
        (claimed(npy(PAIR, shape=(3,)), shape=(3,)), "12 bytes; 8 came"),
        (claimed(npy(PAIR, shape=(10**9, 10**9)), shape=(10**9, 10**9)), "8 came"),
        (claimed(npy(PAIR, shape=(2**62, 4)), shape=(2**62, 4)), "8 came"),
        (claimed(npy(PAIR, shape=(-1, -2)), shape=(-1, -2)), "8 came"),
        (claimed(npy(PAIR) + b"tail"), "12 came"),
    ],
)
def test_anything_else_is_refused_by_name_and_allocates_nothing(content: RecordDict, named: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ContractError) as caught:
            open_records(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert named in str(caught.value)
    assert peak < 4 * HEADER_LIMIT


def test_what_would_be_refused_is_not_sent() -> None:
    with pytest.raises(ContractError, match="`w` has dtype object"):
        to_records({"w": np.array([None])}, "{}")
    with pytest.raises(ContractError, match="header"):
        to_records({}, " " * (HEADER_LIMIT + 1))


def test_a_site_that_raises_costs_one_error_reply_and_its_data_stays_home() -> None:
    app = ClientApp()

    @app.train()
    def fail(message: Message, context: Context) -> Message:
        if context.node_config["site"] == "a":
            raise ValueError("could not convert string to float: '73.1 bar'")
        return Message(to_records({}, "{}"), reply_to=message)

    grid = LoopbackGrid(app, [{"site": "a"}, {"site": "b"}])
    ids = grid.push_messages([Message(to_records({}, "{}"), node, "train") for node in grid.get_node_ids()])
    bad, good = grid.pull_messages(ids)
    assert error_site(good) is None
    failed = error_site(bad)
    assert failed is not None and failed[0] == ids[0] and "ValueError" in failed[2] and "73.1" not in failed[2]
    assert grid.pull_messages(ids) == [], "each reply is handed out once"


def test_only_texts_about_the_exchange_leave_a_site_and_without_folders() -> None:
    assert reason_of(StorageError("/srv/plant/vault/r1.st: disk full")) == "StorageError: r1.st: disk full"
    assert "12.5" not in reason_of(DataError("press.csv line 3: found 12.5"))


def test_a_pin_follows_the_content_and_not_how_it_is_packed(tmp_path: Path) -> None:
    packed = app_bytes(Path(trunkline.__file__).parent / "app")
    again = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed)) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert again.getvalue() != packed and fab_digest(again.getvalue()) == fab_digest(packed)
    assert fab_digest(packed) == app_digest(Path(trunkline.__file__).parent / "app")

    (tmp_path / "pyproject.toml").write_bytes((Path(trunkline.__file__).parent / "app" / "pyproject.toml").read_bytes())
    assert app_digest(tmp_path) == fab_digest(packed)
    (tmp_path / "extra.py").write_text("")
    assert app_digest(tmp_path) != fab_digest(packed), "one more file, even an empty one, is another app"


@pytest.mark.parametrize("made", [b"", b"PK\x03\x04 cut short", b"\x00" * 100])
def test_what_is_no_archive_has_a_digest_nobody_pins(made: bytes) -> None:
    assert len(fab_digest(made)) == 64 and fab_digest(made) != fab_digest(made + b"x")


def test_an_archive_that_unpacks_to_too_much_is_hashed_without_unpacking_it() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", b"\x00" * (64 << 20))
    tracemalloc.start()
    try:
        fab_digest(stream.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_thin_app_ships_no_code_and_lets_a_run_be_named() -> None:
    import tomllib

    folder = Path(trunkline.__file__).parent / "app"
    assert [path.name for path in folder.iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((folder / "pyproject.toml").read_text())
    assert app["project"]["dependencies"] == []
    assert set(app["tool"]["flwr"]["app"]["config"]) == {"run-toml", "out", "resume", "state"}
    assert json.loads(json.dumps(app["tool"]["flwr"]["app"]["components"])) == {
        "serverapp": "trunkline.server.app:app",
        "clientapp": "trunkline.client.app:app",
    }
