import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trunkline.errors import ForeignState, StorageError
from trunkline.runtime.storage import Shelf, write_atomic


def shelf_with(folder: Path, rounds: int, told: list[str]) -> Shelf:
    shelf = Shelf(folder, keep=3, tell=told.append)
    for round in range(1, rounds + 1):
        shelf.put(round, {"w": np.full((2, 3), round, np.float32)}, {"round": round})
    return shelf


def test_what_is_put_comes_back_bit_for_bit_strided_arrays_too(tmp_path: Path) -> None:
    strided = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    shelf = Shelf(tmp_path)
    shelf.put(
        1, {"strided": strided, "empty": np.zeros((0, 3), np.float32), "scalar": np.float64(2.5)}, {"a": [1, None]}
    )
    tensors, meta = shelf.get(1)
    np.testing.assert_array_equal(tensors["strided"], strided)
    assert tensors["empty"].shape == (0, 3)
    assert tensors["scalar"] == 2.5
    assert tensors["scalar"].shape == ()
    assert meta == {"a": [1, None]}


def test_only_the_last_three_versions_are_kept(tmp_path: Path) -> None:
    assert shelf_with(tmp_path, 7, []).rounds() == [5, 6, 7]


def test_going_back_forgets_the_rounds_that_are_no_longer_true(tmp_path: Path) -> None:
    shelf = shelf_with(tmp_path, 7, [])
    shelf.put(6, {"w": np.zeros(1)}, {})
    assert shelf.rounds() == [5, 6]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "garbage"])
def test_a_damaged_file_is_passed_over_for_the_one_before_and_said_so(tmp_path: Path, damage: str) -> None:
    told: list[str] = []
    shelf = shelf_with(tmp_path, 4, told)
    path = shelf.path(4)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    path.write_bytes(
        {"flip": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b"", "garbage": b"\xff" * 40}[damage]
    )
    found = shelf.newest()
    assert found is not None
    assert found[0] == 3
    assert len(told) == 1
    assert str(path) in told[0]
    assert "Going back to round 3" in told[0]


def test_no_bit_of_a_file_can_flip_unnoticed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, kind="vault", owner="press-07")
    shelf.put(1, {"w": np.ones(2, np.float32)}, {"loss": 0.5, "name": "x"})
    data = shelf.path(1).read_bytes()
    with shelf.path(1).open(
        "r+b", buffering=0
    ) as file:  # changed in place: a new file each time takes ten times as long
        for offset, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)
                try:
                    shelf.get(1)
                except ForeignState as error:
                    pytest.fail(f"bit {bit} of byte {offset}: called another's: {error}")
                except StorageError as error:
                    assert "damaged" in str(error)
                else:
                    pytest.fail(f"bit {bit} of byte {offset} of {len(data)} flipped, and nobody noticed")
            os.pwrite(file.fileno(), bytes([byte]), offset)
    assert shelf.get(1)[1] == {"loss": 0.5, "name": "x"}


def test_no_file_cut_short_is_taken_for_a_whole_one(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(1, {"w": np.ones(2, np.float32)}, {})
    for size in reversed(range(shelf.path(1).stat().st_size)):
        os.truncate(shelf.path(1), size)
        with pytest.raises(StorageError, match="damaged"):
            shelf.get(1)


def test_a_damaged_file_is_set_aside_by_what_takes_its_place(tmp_path: Path) -> None:
    shelf = shelf_with(tmp_path, 4, [])
    broken = shelf.path(4).read_bytes()[:-5]
    shelf.path(4).write_bytes(broken)
    shelf.newest()
    shelf.put(4, {"w": np.zeros(1)}, {})
    assert shelf.rounds() == [2, 3, 4]
    assert shelf.path(4).with_suffix(".damaged").read_bytes() == broken
    assert shelf.get(4)[0]["w"].tolist() == [0.0]


def test_with_every_version_damaged_it_refuses_rather_than_start_afresh(tmp_path: Path) -> None:
    shelf = shelf_with(tmp_path, 3, [])
    for round in shelf.rounds():
        shelf.path(round).write_bytes(b"no")
    with pytest.raises(StorageError, match="none of its 3 versions is intact"):
        shelf.newest()


def test_an_empty_shelf_is_no_error(tmp_path: Path) -> None:
    assert Shelf(tmp_path / "absent").newest() is None


FULL_DISK = """
import resource, signal, sys
import numpy as np
from trunkline.errors import ForeignState, StorageError
from trunkline.runtime.storage import Shelf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses the write half-way, as a full disk does
try:
    Shelf(__import__("pathlib").Path(sys.argv[1])).put(2, {"w": np.ones(100_000, np.float32)}, {})
except StorageError as error:
    print(error)
    sys.exit(7)
"""


def test_a_disk_that_fills_up_while_writing_leaves_the_version_before_it(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE
    assert signal.SIGXFSZ
    shelf = shelf_with(tmp_path, 1, [])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 7, done.stderr
    assert "could not be written" in done.stdout
    assert "version before it is intact" in done.stdout
    assert "Free space" in done.stdout
    assert shelf.rounds() == [1]
    np.testing.assert_array_equal(shelf.get(1)[0]["w"], np.ones((2, 3), np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.safetensors"]


def test_write_atomic_leaves_private_files(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "secret", b"x")
    assert (tmp_path / "a" / "secret").stat().st_mode & 0o777 == 0o600
