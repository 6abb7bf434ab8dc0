"""The digest of an app archive (FAB): what a plant pins."""

import hashlib
import io
import zipfile
import zlib
from pathlib import Path

from trunkline.errors import DeploymentError
from trunkline.flower.private import build_fab_from_files

APP_LIMIT = 1 << 20  # bytes an app may unpack to while it is hashed; the thin app has about 1 kB


def app_bytes(app_folder: Path) -> bytes:
    """The FAB (Flower's app archive) of a folder: a zip with fixed dates and sorted names."""
    files = {
        path.relative_to(app_folder).as_posix(): path.read_bytes()
        for path in sorted(app_folder.rglob("*"))
        if path.is_file()
    }
    try:
        return build_fab_from_files(files)[0]
    except ValueError as error:
        raise DeploymentError(f"{app_folder}: not a Flower app: {error}") from None


def app_digest(app_folder: Path) -> str:
    """What a plant pins of an app: see `fab_digest`."""
    return fab_digest(app_bytes(app_folder))


def fab_digest(fab: bytes) -> str:
    """sha256 over the names and bytes in an app archive, in their order; nothing is written or imported.

    Not over the archive itself: two builds of zlib pack the same file into different bytes, and a server on another
    Linux would then be refused by every plant. What is no archive, or unpacks to more than 1 MiB, has the digest of its
    raw bytes, which no folder's pin can equal.
    """
    total = hashlib.sha256()
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > APP_LIMIT:
                raise ValueError("unpacks to too much")
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    content = file.read(APP_LIMIT + 1)  # the claimed size is the sender's word, so it is not relied on
                if len(content) > APP_LIMIT:
                    raise ValueError("unpacks to too much")
                name = entry.filename.encode()
                total.update(b"%d:%b%d:" % (len(name), name, len(content)) + content)
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError, OSError):
        return hashlib.sha256(b"raw:" + fab).hexdigest()
    return total.hexdigest()
