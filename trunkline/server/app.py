"""The ServerApp: the same at the centre of a deployment, over Ray and in the tests."""

import json
import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from trunkline.config import RunConfig, parse_run, read_run
from trunkline.errors import ConfigError, TrunklineError
from trunkline.progress import EVENTS
from trunkline.server.registry import Registry
from trunkline.server.report import write_report
from trunkline.server.rounds import run_rounds

app = ServerApp()
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what `run-toml` says and leave checkpoints, events and the report in `out`.

    run_config:
        run-toml: the text of a run.toml (or the same as JSON), or the path of one on this machine; empty: all defaults.
        out: folder of the run; empty: a folder of the run's name below the home of the server's user.
        resume: 1 to go on from the newest checkpoint in `out`.
        state: the federation's folder: only who is enrolled there takes part, under the name it was invited as.
    """
    config = context.run_config
    run = _run_of(str(config.get("run-toml", "")))
    out = Path(str(config.get("out") or Path.home() / ".trunkline" / "runs" / run.name))
    out.mkdir(parents=True, exist_ok=True)
    state = str(config.get("state", ""))
    registry = Registry(Path(state)) if state else None
    stamp = getattr(grid, "stamp", dict)  # a simulated world says when it was on its own clock
    with (out / EVENTS).open("a", encoding="utf-8", buffering=1) as events:

        def tell(event: Mapping[str, Any]) -> None:
            events.write(json.dumps(stamp(event)) + "\n")

        try:
            report = run_rounds(
                grid,
                run,
                out,
                resume=bool(config.get("resume", 0)),
                tell=tell,
                roster=(lambda: registry.read().nodes()) if registry is not None else None,
            )
            write_report(report, out)
            tell({"event": "done", "out": str(out)})
        except TrunklineError as error:
            tell({"event": "error", "text": str(error)})
            raise
        except Exception as error:
            tell(
                {
                    "event": "error",
                    "text": f"{type(error).__name__}: {error}. This is a defect of Trunkline; the server's log has the traceback.",
                }
            )
            raise


def _run_of(text: str) -> RunConfig:
    if text.endswith(".toml") and "\n" not in text:
        return read_run(Path(text))
    try:
        return parse_run(json.loads(text) if text.startswith("{") else tomllib.loads(text), "run.toml")
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"run-toml: neither TOML nor JSON: {error}.") from None
