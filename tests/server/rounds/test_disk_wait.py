"""A full disk is waited out, and what is told about a run is told once, in order, whatever the disk did meanwhile."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from trunkline.errors import StorageError
from trunkline.runtime.storage import write_atomic
from trunkline.server.rounds import disk_wait as room
from trunkline.server.rounds.disk_wait import DiskWait, EventFile


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], check=False).returncode
    ):
        pytest.skip("a small disk of its own takes the right to mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return filler


def test_what_finds_no_room_is_done_once_there_is_some_and_both_are_told_once(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, naps, said = fill(disk), [], list[str]()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            filler.unlink()

    monkeypatch.setattr(room.time, "sleep", nap)
    DiskWait(disk, said.append, 60.0)(lambda: write_atomic(disk / "state", b"x" * 100_000))
    assert (disk / "state").stat().st_size == 100_000
    assert len(naps) == 3
    assert "The run stands still" in said[0] and "No space left" in said[0] and "0.0 of 1 MB are free" in said[0]
    assert "The run goes on" in said[1] and len(said) == 2


def test_where_nobody_waits_a_full_disk_ends_it_at_once(disk: Path) -> None:
    fill(disk)
    with pytest.raises(StorageError, match="No space left"):
        DiskWait(disk, lambda text: None, 0.0)(lambda: write_atomic(disk / "state", b"x" * 100_000))


def test_lines_wait_in_memory_for_a_full_disk_and_come_in_order(disk: Path) -> None:
    lines = EventFile(disk / "events.jsonl")
    lines.write("first")
    filler = fill(disk)
    for number in range(600):  # more than the page that the file has left
        lines.write(f"{number:010d}")
    written = (disk / "events.jsonl").read_bytes()
    assert written.count(b"\n") < 601
    filler.unlink()
    lines.write("last")
    assert (disk / "events.jsonl").read_text().splitlines() == ["first", *(f"{n:010d}" for n in range(600)), "last"]
    lines.close()


def test_a_line_that_was_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "round"}\n{"event": "ro')
    lines = EventFile(tmp_path / "events.jsonl")
    lines.write('{"event": "start"}')
    lines.close()
    assert (tmp_path / "events.jsonl").read_text().splitlines()[-1] == '{"event": "start"}'
