"""C-MAPSS turbofans: the four run-to-failure fleets of NASA, as plants that own whole engines.

Saxena, Goebel, Simon, Eklund: Damage Propagation Modeling for Aircraft Engine Run-to-Failure Simulation (PHM 2008).
One row is one flight cycle. FD001 and FD003 fly at one operating condition, FD002 and FD004 at six; FD003 and FD004
have a second fault (fan beside compressor). Every plant scores the last cycle of every published test engine.
"""

import io
from pathlib import Path

import numpy as np
import polars as pl

from trunkline.errors import ConfigError, DataError
from trunkline.protocol.arrays import seed_of
from trunkline.simulations.factories.folder import Files, Plant, Wish, toml, write_plants

FLEETS = ("FD001", "FD002", "FD003", "FD004")
SETTINGS = ("setting1", "setting2", "setting3")
SENSORS = tuple(f"s{sensor:02d}" for sensor in range(1, 22))
# the other seven are constant at one operating condition and are left out in nearly every paper
CHANNELS = ("s02", "s03", "s04", "s07", "s08", "s09", "s11", "s12", "s13", "s14", "s15", "s17", "s20", "s21")

CAP = 125  # cycles; above it no sensor shows wear yet, and papers score the truth capped here
REFERENCE = 20  # cycles that show how an engine was built: validation RMSE of rul 10.8 -> 10.0 (none, 10, 20, 50 tried)
MANY = 50  # engines from which on that helps: with ten, a plant learns its engines by heart (test RMSE 14.4 -> 15.8)
HORIZON = 30  # cycles: `failing` is 1 when the engine fails within this many
CRITICAL = 50  # cycles: `stage` is healthy above CAP, worn from CAP down to CRITICAL, critical below

SOURCE = (
    "Get `Turbofan Engine Degradation Simulation Data Set` (CMAPSSData.zip) from the NASA Prognostics Data Repository, "
    "unpack it into one folder and give that folder, or the one above it if it is called `cmapss`, with --data."
)


def write(out: Path, wish: Wish) -> list[Path]:
    """Site folders fd001 .. fd004, or fd001-a, fd001-b, ... when `wish.plants` deals each fleet to several plants.

    Args:
        wish: `plants` is a multiple of 4 (each fleet goes to plants / 4 sites, no engine to two of them); `groups`
            leaves each plant that many training engines in total, its validation engines included.

    Raises:
        ConfigError: `plants` or `groups` cannot be dealt.
        DataError: a file of the data set is absent or is not what its name says.
    """
    plants = len(FLEETS) if wish.plants is None else wish.plants
    if plants < 1 or plants % len(FLEETS):
        raise ConfigError(f"--plants {plants}: C-MAPSS has four fleets, so ask for a multiple of 4: 4, 8, 12, ...")
    if wish.data is None:
        raise DataError(f"cmapss: no folder given. {SOURCE}")
    folder = find_data(wish.data)
    return write_plants(out, [plant for fleet in FLEETS for plant in _deal(folder, fleet, plants // len(FLEETS), wish)])


def find_data(data: Path) -> Path:
    """`data` or `data`/cmapss, whichever holds the first file of the set.

    Raises:
        DataError: neither does.
    """
    names = [f"train_{FLEETS[0]}{suffix}" for suffix in (".parquet", ".txt")]
    for folder in (data, data / "cmapss"):
        if any((folder / name).is_file() for name in names):
            return folder
    raise DataError(f"{data}: neither {' nor '.join(names)} is there or in {data / 'cmapss'}. {SOURCE}")


def read_fleet(folder: Path, fleet: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train and test rows of one fleet: `unit` (a name unique over all fleets), `cycle`, settings, sensors, labels.

    `rul` is in cycles and not capped; a training engine fails at its last row, a test engine is cut `RUL_<fleet>.txt`
    cycles before. `failing` is 0/1 and `stage` one of healthy, worn, critical.

    Raises:
        DataError: a file is absent, has other columns, or the RUL file has another number of engines.
    """
    train, test = (_read_rows(folder, part, fleet) for part in ("train", "test"))
    path = folder / f"RUL_{fleet}.txt"
    try:
        left = np.loadtxt(path, dtype=np.int32, ndmin=1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it holds the true life left of the test engines. {SOURCE}") from None
    except ValueError as error:
        raise DataError(f"{path}: not one whole number a line ({error}). {SOURCE}") from None
    units = test["unit"].unique(maintain_order=True)
    if len(left) != len(units):
        raise DataError(f"{path}: {len(left)} engines; test_{fleet} has {len(units)}, so they do not belong together.")
    remaining = test["unit"].replace_strict(units, pl.Series(left), return_dtype=pl.Int32)
    return _labelled(train, pl.lit(0, dtype=pl.Int32)), _labelled(test, remaining)


def _read_rows(folder: Path, part: str, fleet: str) -> pl.DataFrame:
    """The rows of `<part>_<fleet>`, parquet or NASA's own blank-separated text, sorted by engine and cycle."""
    columns = ["unit", "cycle", *SETTINGS, *SENSORS]
    whole = [pl.col(name).cast(pl.Int32) for name in columns[:2]]
    path = folder / f"{part}_{fleet}.parquet"
    path = path if path.is_file() else path.with_suffix(".txt")
    try:
        rows = pl.read_parquet(path, columns=columns) if path.suffix == ".parquet" else _read_text(path, columns)
        rows = rows.select(*whole, pl.col(*columns[2:]).cast(pl.Float64)).sort("unit", "cycle")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, nor a .parquet of that name. {SOURCE}") from None
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise DataError(f"{path}: not a C-MAPSS table ({str(error).splitlines()[0]}). {SOURCE}") from None
    # test engines are numbered from 1 again, and so is every fleet: the part and fleet make the name one engine's
    names = pl.format(f"{fleet.lower()}-{part}-{{}}", pl.col("unit").cast(pl.String).str.zfill(3))
    return rows.with_columns(unit=names)


def _read_text(path: Path, columns: list[str]) -> pl.DataFrame:
    table = np.loadtxt(path, ndmin=2)  # (rows, columns)
    if table.shape[1] != len(columns):
        raise ValueError(f"{table.shape[1]} columns, expected {len(columns)}")
    return pl.DataFrame(table, schema=columns, orient="row")


def _labelled(rows: pl.DataFrame, left: pl.Series | pl.Expr) -> pl.DataFrame:
    """`rows` with rul, failing and stage; `left` is the life (cycles) after an engine's last row."""
    rul = pl.col("rul")
    worn = pl.when(rul >= CRITICAL).then(pl.lit("worn")).otherwise(pl.lit("critical"))
    stage = pl.when(rul > CAP).then(pl.lit("healthy")).otherwise(worn)
    rows = rows.with_columns(rul=pl.col("cycle").max().over("unit") - pl.col("cycle") + left)
    return rows.with_columns(failing=(rul <= HORIZON).cast(pl.Int8), stage=stage)


def _deal(folder: Path, fleet: str, sites: int, wish: Wish) -> list[Plant]:
    """`sites` plants that share out the training engines of one fleet."""
    train, test = read_fleet(folder, fleet)
    units = train["unit"].unique(maintain_order=True).to_numpy()
    most = len(units) // sites
    if most < 2:
        raise ConfigError(
            f"--plants {sites * len(FLEETS)}: {fleet} has {len(units)} training engines, fewer than 2 (one to train, "
            f"one to validate) for each of {sites} plants. Ask for at most {len(units) // 2 * len(FLEETS)} plants."
        )
    if wish.groups is not None and not 2 <= wish.groups <= most:
        raise ConfigError(
            f"--groups {wish.groups}: a plant of {fleet} owns {most} training engines and needs 2 (one to train, "
            f"one to validate). Ask for 2 to {most}, or for other --plants."
        )
    if sites > 1 or wish.groups is not None:
        units = np.random.default_rng(seed_of(wish.seed, "cmapss", fleet)).permutation(units)
    published = _parquet(test)

    def plant(name: str, owned: list[str]) -> Plant:
        def files() -> Files:
            mine = train.filter(pl.col("unit").is_in(owned))
            about = _site_toml(name, fleet, len(owned))
            return {"train.parquet": _parquet(mine), "test.parquet": published, "site.toml": about}

        return Plant(name, files)

    shares = [share[: wish.groups].tolist() for share in np.array_split(units, sites)]
    names = [fleet.lower()] if sites == 1 else [f"{fleet.lower()}-{_letters(index)}" for index in range(sites)]
    return [plant(name, owned) for name, owned in zip(names, shares, strict=True)]


def _letters(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _parquet(rows: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    rows.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()


def _site_toml(name: str, fleet: str, engines: int) -> bytes:
    stages = ("healthy", "worn", "critical")
    table = {
        "name": name,
        "data": {
            "files": "train.parquet",
            "test_files": "test.parquet",
            "test_at": "last",
            "group": "unit",
            "order": "cycle",
            "channels": CHANNELS,
            "window": 64,
            "regime": SETTINGS,
            "reference": REFERENCE if engines >= MANY else 0,
            "split": {"validation": 0.2},
        },
        # remaining life leads: light side tasks cost it nothing, heavy ones do not help it
        "tasks": {
            "rul": {"kind": "regression", "target": "rul", "unit": "cycles", "cap": CAP, "loss": "mse", "weight": 1.0},
            "failing": {"kind": "binary", "target": "failing", "weight": 0.1},
            "stage": {"kind": "multiclass", "target": "stage", "classes": stages, "weight": 0.1},
        },
    }
    about = (
        f"{engines} turbofan engines of C-MAPSS {fleet} (NASA), run to failure; one row is one flight cycle.\n"
        "Tested on every published test engine, at its last cycle.\n"
        f"rul: cycles to failure. failing: fails within {HORIZON} cycles.\n"
        f"stage: healthy above {CAP} cycles of rul, worn down to {CRITICAL}, critical below."
    )
    return toml(table, about)
