"""How many worker processes a simulation starts."""

import os

from trunkline.config.run import RunConfig
from trunkline.errors import ConfigError

# Optimiser steps of all sites in all rounds. About from here on, on two cores, workers repay the time of their start.
SMALL_RUN_STEPS = 600


def count_workers(text: str, sites: int, address: str | None, run: RunConfig) -> int | None:
    """Worker processes for `text`, the value of --workers: `auto` or a number.

    Returns:
        0: everything in this process; None: one for each CPU of the cluster at `address`, which only the cluster knows.
    """
    if text == "auto":
        if address:
            return None
        return 0 if is_small(run, sites) else max(1, min(len(os.sched_getaffinity(0)), sites))
    if not text.isdigit():
        raise ConfigError(f"--workers {text}: expected `auto`, or a number; 0 means without worker processes.")
    if int(text) == 0 and address:
        raise ConfigError(
            "--workers 0 runs everything in this process, so there is no cluster to join. Drop one of it and --address."
        )
    return min(int(text), sites)


def is_small(run: RunConfig, sites: int) -> bool:
    """Whether all the training of a run takes less time than the start of workers: a few small sites need no Ray."""
    if run.training.epochs is not None or run.search.trials or run.newcomers.sites:
        return False
    steps = run.training.steps + run.training.finish_steps / run.total_rounds
    return run.total_rounds * steps * sites * (2 if run.report.baseline else 1) <= SMALL_RUN_STEPS
