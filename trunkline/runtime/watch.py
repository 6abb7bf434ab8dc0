"""Follow the events of a run while the same process works on it or waits for it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from trunkline.runtime.progress import EVENTS, Progress, tail

Result = TypeVar("Result")

END_S = 5.0  # longest wait for the display's last lines


def run_with_progress(out: Path, work: Callable[[], Result]) -> Result:
    """Do `work` while a second thread shows the events that the round loop appends to `out`/events.jsonl."""
    events = out / EVENTS
    start = events.stat().st_size if events.exists() else 0
    ended = threading.Event()
    with Progress(Console()) as progress:

        def show() -> None:
            for event in tail(events, ended.is_set, start=start):
                progress(event)

        watcher = threading.Thread(target=show, daemon=True)
        watcher.start()
        try:
            return work()
        finally:
            ended.set()
            watcher.join(timeout=END_S)
