"""The commit protocol: a folder of files is complete and verified, or it does not count.

Written to a temporary folder on the same file system, every file fsynced, a manifest of sizes and checksums last, then
one rename. A rename is the only thing that ever makes a committed folder appear or disappear.
"""

import errno
import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from avlit.durable import sync_folder
from avlit.errors import UserError

MANIFEST_NAME = "COMMIT.json"
# Against damage, not against an adversary: measured 32 GB/s where sha256 does 2 (and a bit flip is as visible).
ALGORITHM = "xxh3_128"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
STEP_NAME = re.compile(r"step-(\d{8,})")
STALE_NAME = re.compile(r"(step-\d{8,})\.(tmp|old|gone)-\d+")
CHUNK = 8 << 20
PATIENCE_S = 300.0
"""How long other ranks may write nothing before a checkpoint is given up; a disk may take minutes for what it has."""

Writers = Mapping[str, Callable[[Path], object]]
"""File name -> what writes the file of that name."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is not there, or is damaged; the message names the folder and the reason."""


@dataclass(frozen=True)
class Skipped:
    """A folder that does not count as a checkpoint, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


def step_dir(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step a folder's name says, None for another kind of name."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def committed_dirs(folder: Path) -> list[Path]:
    """Folders with a committed name, newest step first; verified or not."""
    found = [path for path in folder.iterdir() if step_of(path) is not None] if folder.is_dir() else []
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def begin(folder: Path, step: int) -> Path:
    """Make the empty temporary folder of a checkpoint to come; `commit` and, on other ranks, `write_part` fill it."""
    final = step_dir(folder, step)
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def commit(
    folder: Path,
    step: int,
    writers: Writers,
    *,
    temporary: Path | None = None,
    num_ranks: int = 1,
    patience_s: Callable[[], float] = lambda: PATIENCE_S,
) -> Path:
    """Let each writer make the file of its name in a temporary folder, then commit that as the checkpoint of `step`.

    Returns its folder. One of that step that is already there is not touched before the new one is durable. Whatever
    a writer raises leaves all committed folders as they were.
    temporary: what `begin` made, where ranks 1 to num_ranks - 1 write into it, too; what each has written is waited
    for, until they have written nothing for patience_s. CheckpointError: one of them could not, or has ended.
    """
    final = step_dir(folder, step)
    temporary = temporary or begin(folder, step)
    try:
        entries = _write_files(temporary, writers)
        _seal(temporary, step, entries | _await_parts(temporary, num_ranks, patience_s))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # Two renames, not one, where a run comes to the same step again: `sweep` undoes the first if killed in between.
    previous = final.with_name(f"{final.name}.old-{os.getpid()}")
    if final.exists():
        os.rename(final, previous)
    try:
        os.rename(temporary, final)
    except OSError:
        if previous.exists():
            os.rename(previous, final)
        raise
    sync_folder(folder)
    shutil.rmtree(previous, ignore_errors=True)
    return final


def write_part(temporary: Path, rank: int, writers: Writers) -> None:
    """Make this rank's files of a checkpoint that the first rank commits; they are durable when that is told of them.

    Whatever a writer raises is told as well, so that the first rank does not wait for it, and is raised here.
    """
    try:
        told: dict[str, object] = {"files": _write_files(temporary, writers)}
    except BaseException as error:
        for name in writers:  # a full disk must have room for the telling
            (temporary / name).unlink(missing_ok=True)
        _tell(temporary, rank, {"error": str(error)})
        raise
    _tell(temporary, rank, told)


def _tell(temporary: Path, rank: int, told: Mapping[str, object]) -> None:
    if not temporary.is_dir():  # given up by the first rank
        return
    path = temporary / _report_name(rank)
    path.with_suffix(".tmp").write_text(json.dumps(told), encoding="utf-8")
    os.rename(path.with_suffix(".tmp"), path)


def _report_name(rank: int) -> str:
    return f"rank-{rank}.json"


def _await_parts(temporary: Path, num_ranks: int, patience_s: Callable[[], float]) -> dict[str, dict[str, object]]:
    """What the manifest says of the other ranks' files, once all are on the disk."""
    entries: dict[str, dict[str, object]] = {}
    waiting, seen, since = set(range(1, num_ranks)), -1, time.monotonic()
    while waiting:
        for rank in sorted(waiting):
            report = temporary / _report_name(rank)
            if report.is_file():
                told = json.loads(report.read_text(encoding="utf-8"))
                if "error" in told:
                    raise CheckpointError(f"rank {rank} could not write its part: {told['error']}")
                entries |= told["files"]
                report.unlink()
                waiting.remove(rank)
        written = sum(path.stat().st_size for path in temporary.iterdir() if path.suffix != ".tmp")
        if written != seen:
            seen, since = written, time.monotonic()
        elif time.monotonic() - since > patience_s():
            ranks = ", ".join(map(str, sorted(waiting)))
            raise CheckpointError(f"rank {ranks} has written nothing for {patience_s():.0f} s; its process has ended?")
        if waiting:
            time.sleep(0.02)
    return entries


def _write_files(folder: Path, writers: Writers) -> dict[str, dict[str, object]]:
    """What the manifest says of the files, all of which are on the disk."""
    entries: dict[str, dict[str, object]] = {}
    syncing: list[threading.Thread] = []
    failures: list[OSError] = []
    try:
        for name, write in writers.items():
            write(folder / name)
            # The disk takes a file while its checksum is made, from pages still in memory, and the next is written.
            thread = threading.Thread(
                target=_sync_file, args=(folder / name, failures), name=f"sync-{name}", daemon=True
            )
            thread.start()
            syncing.append(thread)
            entries[name] = _entry(folder / name)
    finally:
        for thread in syncing:
            thread.join()
    if failures:
        raise failures[0]
    return entries


def _entry(path: Path) -> dict[str, object]:
    return {"size": path.stat().st_size, "digest": _digest(path)}


def _seal(folder: Path, step: int, entries: Mapping[str, Mapping[str, object]]) -> None:
    manifest = {"format": 1, "step": step, "algorithm": ALGORITHM, "files": entries}
    with open(folder / MANIFEST_NAME, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _sync_file(path: Path, failures: list[OSError]) -> None:
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        failures.append(error)


def verify(path: Path, *, wrong_names: Callable[[Collection[str]], str], is_quick: bool = False) -> tuple[str, ...]:
    """Raise CheckpointError unless the folder is exactly what was committed; returns its files, sorted.

    wrong_names: of the names of its files, what is wrong with them for a folder of this kind, "" for nothing; files of
    other names are never opened. is_quick: compare names and sizes only.
    """
    files = _read_manifest(path)
    if wrong := wrong_names(files.keys()):
        raise CheckpointError(f"{path}: {MANIFEST_NAME} {wrong}")
    for name, (size, digest) in files.items():
        try:
            found_size = _plain_size(path, name)
        except OSError as error:
            raise CheckpointError(f"{path}: {name} is missing ({error.strerror})") from error
        if found_size != size:
            raise CheckpointError(f"{path}: {name} has {found_size} bytes, {size} were committed")
        if not is_quick and (found := _digest(path / name)) != digest:
            raise CheckpointError(f"{path}: {name} is damaged: checksum {found}, {MANIFEST_NAME} says {digest}")
    return tuple(sorted(files))


def _plain_size(path: Path, name: str) -> int:
    """Bytes of a file in the folder; a link could lead out of it, and a pipe would be read for ever."""
    status = (path / name).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: {name} is not a plain file")
    return status.st_size


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    try:
        _plain_size(path, MANIFEST_NAME)
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no {MANIFEST_NAME}, so it was never completed") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST_NAME} cannot be read: {error}") from error
    try:
        algorithm, step = manifest["algorithm"], manifest["step"]
        files = {name: (int(entry["size"]), str(entry["digest"])) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {MANIFEST_NAME} is not a manifest ({error!r})") from error
    if algorithm != ALGORITHM:
        raise CheckpointError(f"{path}: {MANIFEST_NAME} says algorithm {algorithm!r}, only {ALGORITHM} is known")
    if (named := step_of(path)) is not None and named != step:
        raise CheckpointError(f"{path}: {MANIFEST_NAME} is of step {step}")
    for name in files:
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {MANIFEST_NAME} lists {name!r}, which is not a file name")
    return files


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def sweep(folder: Path) -> list[Path]:
    """Clear what killed processes left: unfinished and half-removed folders. At start, holding the run (`runs.hold`).

    A folder that was set aside for a new one of the same step comes back if the new one never appeared.
    """
    swept = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (match := STALE_NAME.fullmatch(path.name)):
            continue
        final = folder / match[1]
        if match[2] == "old" and not final.exists():
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)
        swept.append(path)
    return swept


def remove(path: Path) -> None:
    """Take a committed folder away: renamed first, so that a kill never leaves half of one under its name."""
    going = path.with_name(f"{path.name}.gone-{os.getpid()}")
    os.rename(path, going)
    shutil.rmtree(going)


def check_writable(folder: Path, need_bytes: int) -> None:
    """Raise CheckpointError unless a file can be written in `folder` and `need_bytes` are free; before step 1."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"avlit")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: checkpoints cannot be written there ({error.strerror}); choose another place with runs_dir=…"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.2f} GB free, checkpoints need {need_bytes / 1e9:.2f} GB; "
            "free some, keep fewer (checkpoint.keep=…) or choose another place with runs_dir=…"
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that no space is left (safetensors reports it as text only)."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "No space left" in str(error)
