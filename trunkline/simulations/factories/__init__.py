"""Data sets as real site folders: what `trunkline sites` writes is what a plant would set up by hand."""

from pathlib import Path

from trunkline.errors import ConfigError, DataError, nearest
from trunkline.simulations.factories import cmapss, synthetic
from trunkline.simulations.factories.folder import Factory, Wish

FACTORIES: dict[str, Factory] = {
    "synthetic": Factory(
        synthetic.write,
        needs_data=False,
        about="made-up plants that wear out by one law under different sensors; 4 plants, or any number",
    ),
    "cmapss": Factory(
        cmapss.write, needs_data=True, about="NASA turbofan engines run to failure; 4 plants, or any multiple of 4"
    ),
}


def write_sites(
    name: str,
    out: Path,
    *,
    data: Path | None = None,
    plants: int | None = None,
    groups: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write the site folders of data set `name` below `out`; equal arguments give equal bytes.

    Args:
        data: folder with the data set's files, for one that needs it.
        plants: number of sites the groups are dealt to; None: as the data set comes.
        groups: labelled groups (engines, runs) each plant has to learn from, validation included; None: all of them.
        seed: of every random choice.

    Returns:
        The folders, each with site.toml and its data, in the data set's own order.

    Raises:
        ConfigError: an unknown name, a number that cannot be dealt, or `out` holds something else.
        DataError: the data set's files are not where `data` says.
    """
    if name not in FACTORIES:
        known = ", ".join(sorted(FACTORIES))
        raise ConfigError(f"unknown data set {name!r}{nearest(name, FACTORIES)} Known: {known}.")
    factory = FACTORIES[name]
    if factory.needs_data and data is not None and not data.is_dir():
        raise DataError(f"{data}: no such folder. Give --data the folder that holds the files of {name}.")
    return factory.write(out, Wish(data, plants, groups, seed))


__all__ = ["FACTORIES", "Factory", "write_sites"]
