"""Folders a command is given, looked at before anything heavy is imported."""

import shutil
from pathlib import Path

from trunkline.errors import ConfigError
from trunkline.runtime.progress import EVENTS

# what a run leaves in its folder
OURS = ("checkpoint", "state", EVENTS, "report.json", "report.html", "trunk.safetensors", "search", "search.json")
COHORTS = "trunk-[0-9]*.safetensors"  # of a run that ended with several trunks


def site_folders(root: Path) -> list[Path]:
    """The folders below `root` that hold a site.toml, by name."""
    folders = sorted(path.parent for path in root.glob("*/site.toml"))
    if not folders:
        raise ConfigError(
            f"{root}: no site folders (no */site.toml). `trunkline sites synthetic --out {root}` writes some."
        )
    return folders


def prepare(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `out` ready for a run without ever losing an earlier one by accident.

    Raises:
        ConfigError: `out` holds a run and neither `resume` nor `overwrite` says what to do with it.
    """
    ours = [*(out / name for name in OURS), *out.glob(COHORTS)]
    if resume or not any(path.exists() for path in ours):
        out.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        state = "a finished run" if (out / "report.json").exists() else "an unfinished run"
        raise ConfigError(
            f"{out} holds {state}. Go on with --resume, start afresh there with --overwrite, or give another --out."
        )
    for path in ours:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
