"""Small files and renames that survive a crash or a power cut: what run records and shard sets are written with."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `path` so that it is either absent, the old file, or all of `data`, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
