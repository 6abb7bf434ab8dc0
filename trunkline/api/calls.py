"""The functions of the API: each reads its arguments, calls the package and wraps the result."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.api.results import Adaptation, SimulationResult, SiteCheck, describe_check
from trunkline.errors import ConfigError

if TYPE_CHECKING:
    from trunkline.config.run import RunConfig
    from trunkline.config.site import SiteConfig

STATE = ".trunkline"  # a plant's own folder below its site folder
ADAPTED = "adapted"  # and where `adapt` writes below that


def read_run(run: "str | Path | Mapping[str, Any] | RunConfig", overrides: Mapping[str, Any] | None = None) -> "RunConfig":  # fmt: skip
    """Read and check a run: `run.toml`, the same keys as a dictionary, or a run that was read before.

    Args:
        run: path of a run file, a dictionary with its tables, or a `RunConfig`.
        overrides: key path -> value, laid over the run, for example `{"training.steps": 40}`.

    Returns:
        The checked settings, immutable.

    Raises:
        TrunklineError: the file cannot be read, a key is unknown, or a value is out of its range. The text names all
            three and the allowed values.

    Example:
        >>> import trunkline as tl
        >>> tl.read_run({"name": "demo", "rounds": 6}, {"training.steps": 10}).training.steps
        10
    """
    import trunkline.config.run as config
    from trunkline.strategies import build_strategy

    if isinstance(run, config.RunConfig):
        settings = config.with_settings(run, overrides, f"run {run.name!r}") if overrides else run
    elif isinstance(run, Mapping):
        settings = config.parse_run(copy.deepcopy(dict(run)), "run", dict(overrides or {}))
    else:
        settings = config.read_run(Path(run), dict(overrides or {}))
    build_strategy(settings.strategy.name, settings.strategy.options, settings.training)  # refuses a wrong option
    return settings


def read_site(folder: str | Path) -> "SiteConfig":
    """Read and check the `site.toml` of a site folder; no row is read.

    Args:
        folder: the folder that holds `site.toml` and the data.

    Returns:
        The checked settings, immutable.

    Raises:
        TrunklineError: the folder or a key is missing, or a value is out of its range.

    Example:
        >>> tl.read_site("plants/kiln-02").name  # doctest: +SKIP
        'kiln-02'
    """
    import trunkline.config.site as config

    return config.read_site(Path(folder))


def check_site(folder: str | Path, *, state: str | Path | None = None) -> SiteCheck:
    """Open a site as training would and collect every problem on the way. Nothing is written.

    Args:
        folder: the folder that holds `site.toml` and the data.
        state: the plant's state folder, whose split of the rows is used; None: a fresh split is shown.

    Returns:
        A `SiteCheck`. Problems do not raise: `SiteCheck.ok` is False and the report lists them.

    Raises:
        TrunklineError: the state folder is sealed and its key is missing.

    Example:
        >>> tl.check_site("plants/kiln-02").ok  # doctest: +SKIP
        True
    """
    from trunkline.client.check import check_site

    details = check_site(Path(folder), Path(state) if state is not None else None)
    return SiteCheck(Path(folder), describe_check(details), details)


def simulate(
    run: "str | Path | Mapping[str, Any] | RunConfig",
    sites: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int | str = "auto",
    address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SimulationResult:
    """Run a whole federation on this machine and write its report to `out`.

    Args:
        run: as for `read_run`.
        sites: a folder of site folders, or a list of site folders.
        out: folder of the run: checkpoints, state, report.
        workers: Ray worker processes; "auto": one per core, none if the run is small; 0: everything in this process.
        address: a Ray cluster to join, HOST:PORT or ray://HOST:PORT; `sites` and `out` are then on shared storage.
        resume: continue from the newest checkpoint in `out`.
        overwrite: replace an earlier run in `out`.
        progress: show the progress of the rounds on standard output.

    Returns:
        A `SimulationResult` with one row for each site and task.

    Raises:
        TrunklineError: a setting or a site is wrong, `out` holds a run, or too few sites answered.

    Example:
        >>> result = tl.simulate("run.toml", "plants", "out/first")  # doctest: +SKIP
        >>> result.rows[0]["verdict"]  # doctest: +SKIP
        'no clear difference'
    """
    from trunkline.simulations.folders import prepare
    from trunkline.simulations.workers import count_workers

    settings, folders, path = read_run(run), list_sites(sites), Path(out)
    count = count_workers(str(workers), len(folders), address, settings)
    prepare(path, resume=resume, overwrite=overwrite)
    from trunkline.runtime.watch import run_with_progress
    from trunkline.simulations.simulate import simulate

    def work() -> dict[str, Any]:
        return simulate(settings, folders, path, workers=count, resume=resume, address=address)

    return SimulationResult(path, run_with_progress(path, work) if progress else work())


def list_sites(sites: str | Path | Sequence[str | Path]) -> list[Path]:
    """The site folders, ordered by name, so that the order of a list changes no result.

    Raises:
        ConfigError: there is none, a folder has no site.toml, or two folders have one name.
    """
    from trunkline.simulations.folders import site_folders

    if isinstance(sites, str | Path):
        return site_folders(Path(sites))
    folders = sorted((Path(folder) for folder in sites), key=lambda folder: folder.name)
    if not folders:
        raise ConfigError("The list of site folders is empty. `trunkline sites synthetic --out DIR` writes some.")
    for folder, following in zip(folders, [*folders[1:], None], strict=True):
        if not (folder / "site.toml").is_file():
            raise ConfigError(f"{folder}: no site.toml. Give site folders, or the one folder that holds them.")
        if following is not None and folder.name == following.name:
            raise ConfigError(
                f"{folder} and {following} have one name, and the run keeps a site's state by it. Rename one of them."
            )
    return folders


def adapt(
    site: str | Path,
    trunk: str | Path,
    out: str | Path | None = None,
    *,
    groups: int | None = None,
    state: str | Path | None = None,
    unsigned: bool = False,
) -> Adaptation:
    """Make the model that a new plant should use, from a released trunk and the plant's labelled groups.

    Args:
        site: the folder that holds `site.toml` and the data.
        trunk: a released trunk, `trunk.safetensors` of a run.
        out: folder for the model and its evidence; None: `.trunkline/adapted` in the site folder.
        groups: use the labels of this many groups only, to see the effect of fewer labels.
        state: the plant's state folder; None: `.trunkline` in the site folder.
        unsigned: at a plant that has joined a federation, accept a trunk that its server did not sign.

    Returns:
        An `Adaptation` with one row for each task.

    Raises:
        TrunklineError: the site or the release cannot be read, they do not fit together, or the signature is wrong.

    Example:
        >>> adapted = tl.adapt("plants/kiln-02", "out/first/trunk.safetensors")  # doctest: +SKIP
        >>> adapted.choice  # doctest: +SKIP
        'lp_ft'
    """
    from trunkline.client.adaptation import evidence
    from trunkline.client.adaptation.adapt import adapt

    path = Path(out) if out is not None else Path(site) / STATE / ADAPTED
    adapted = adapt(
        Path(site),
        Path(trunk),
        state=Path(state) if state is not None else None,
        labelled=groups,
        unsigned=unsigned,
    )
    report = evidence.collect(adapted)
    evidence.write(adapted, report, path)
    return Adaptation(
        path,
        report,
        model=path / evidence.MODEL,
        page=path / evidence.PAGE,
        sealed=evidence.sealed(path),
        signature=adapted.verdict.line if adapted.verdict is not None else "",
    )
