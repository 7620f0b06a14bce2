"""What a checkpoint holds and how it is written and read; `commit` makes it whole, `inherit` puts it into a model.

`checkpoints/step-00000500/`: weights.safetensors, ema.safetensors (optional), optimizer.safetensors (optional),
state.json and COMMIT.json. Tensors are safetensors, the rest is JSON; nothing is ever unpickled.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from avlit.checkpoint_state import CheckpointState, read_state
from avlit.commit import (
    CheckpointError,
    Skipped,
    commit,
    committed_dirs,
    is_disk_full,
    remove,
    step_of,
    sweep,
    verify,
)
from avlit.ranks import is_part, whole

WEIGHTS, EMA, OPTIMIZER, STATE = "weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, EMA, OPTIMIZER, STATE)
REQUIRED = (WEIGHTS, STATE)

Tensors = Mapping[str, Tensor]


class NonFiniteError(CheckpointError):
    """A tensor to be saved holds NaN or infinity; such a checkpoint is never committed."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed, verified checkpoint; tensors are read when asked for."""

    path: Path
    state: CheckpointState

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def has_ema(self) -> bool:
        return (self.path / EMA).is_file()

    def weights(self, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The saved parameters by name."""
        return self._read(WEIGHTS, device)

    def ema(self, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The averaged parameters by name; empty where the run kept no average."""
        return self._read(EMA, device) if self.has_ema else {}

    def optimizer(self, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The optimizer's tensors, `<parameter>/<slot>`; `state.optimizer` is the rest of it."""
        return self._read(OPTIMIZER, device) if (self.path / OPTIMIZER).is_file() else {}

    def _read(self, name: str, device: str | torch.device) -> dict[str, Tensor]:
        try:
            return load_file(self.path / name, device=str(device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error


def save_checkpoint(
    folder: Path,
    *,
    weights: Tensors,
    state: CheckpointState,
    optimizer: Tensors | None = None,
    ema: Tensors | None = None,
) -> Path:
    """Commit a checkpoint of `state.step` in `folder`; returns its folder. Durable when it returns.

    weights, ema, optimizer: CPU tensors by name that nobody changes meanwhile and that share no memory.
    NonFiniteError: a value is NaN or infinite. CheckpointError: it could not be written; committed ones are untouched.
    """
    parts = {WEIGHTS: weights, EMA: ema, OPTIMIZER: optimizer}
    present = {name: tensors for name, tensors in parts.items() if tensors}
    if not weights:
        raise CheckpointError(f"{folder}: step {state.step} has no weights to save")
    # NaN is written as such: sums of losses for the log may hold one from an update that was left out
    text = json.dumps(asdict(replace(state, versions=state.versions or versions())), indent=1)

    def write_tensors(path: Path) -> None:
        check_finite(present[path.name], f"step {state.step}, {path.name}")
        save_file({key: tensor.contiguous() for key, tensor in present[path.name].items()}, path)

    # The largest first: what is left to wait for at the end is the sync of the smallest.
    by_size = sorted(present, key=lambda name: -sum(tensor.nbytes for tensor in present[name].values()))
    writers: dict[str, Callable[[Path], object]] = dict.fromkeys(by_size, write_tensors)
    writers[STATE] = lambda path: path.write_text(text, encoding="utf-8")
    try:
        return commit(folder, state.step, writers)
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensors in present.values() for tensor in tensors.values())
        reason = "the disk is full" if is_disk_full(error) else str(error)
        raise CheckpointError(
            f"{folder}: step {state.step} ({need / 1e9:.2f} GB) could not be written: {reason}; "
            "checkpoints committed before are untouched"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`, after comparing every byte with its manifest; CheckpointError says what is wrong."""
    verify(path, allowed=FILES, required=REQUIRED)
    return Checkpoint(path, load_state(path))


def load_state(path: Path) -> CheckpointState:
    """What state.json of the checkpoint in `path` says, without comparing anything; CheckpointError: it is damaged."""
    try:
        state = read_state(json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read: {error}") from error
    if (named := step_of(path)) is not None and named != state.step:
        raise CheckpointError(f"{path}: {STATE} is of step {state.step}")
    return state


def newest_valid(
    folder: Path, *, accept: Callable[[CheckpointState], bool] = lambda state: True
) -> tuple[Checkpoint | None, list[Skipped]]:
    """The newest checkpoint in a `checkpoints/` folder that verifies, and the newer ones that do not, with reasons.

    accept: whether a whole one will do; one that will not is passed over. It may raise CheckpointError to say why.
    """
    skipped = []
    for path in committed_dirs(folder):
        try:
            checkpoint = load_checkpoint(path)
            if accept(checkpoint.state):
                return checkpoint, skipped
        except CheckpointError as error:
            skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
    return None, skipped


Protect = Callable[[list[int]], Iterable[int]]
"""Of the steps of whole checkpoints, newest first, those that retention keeps besides the newest."""


def _none(steps: list[int]) -> Iterable[int]:
    return ()


def prune(folder: Path, *, keep: int, protect: Protect = _none) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those that `protect` picks; returns what was removed.

    The last good one stays: nothing goes unless a newer one that is kept verifies in full. Damaged folders are not
    counted, and are left for their owner to look at.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.keep={keep}: at least 1 checkpoint is kept")
    whole: dict[int, Path] = {}
    for path in committed_dirs(folder):
        try:
            verify(path, allowed=FILES, required=REQUIRED, is_quick=bool(whole))
        except CheckpointError:
            continue
        whole[step_of(path) or 0] = path
    kept = {*list(whole)[:keep], *protect(list(whole))}
    removed = [path for step, path in whole.items() if step not in kept]
    for path in removed:
        remove(path)
    return removed


def check_finite(tensors: Tensors, what: str) -> None:
    """Raise NonFiniteError naming the tensors that hold NaN or infinity."""
    bad = []
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point():
            # min and max carry NaN: one pass over the memory, no mask
            low, high = torch.aminmax(tensor)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad.append(name)
    if bad:
        raise NonFiniteError(f"{what}: {len(bad)} tensors are not finite, e.g. {bad[0]}; nothing was saved")


def versions() -> dict[str, str]:
    """Versions that decide whether a resumed run can be bit-identical."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "lightning", "diffusers", "safetensors")}


class CheckpointWriter:
    """Writes checkpoints in the background: training stops only while the state is copied.

    folder: a run's `checkpoints/`. keep, protect: what to retain, see `prune`.
    At most one write is under way; an error in it is raised by the next `save` or `wait`.
    """

    def __init__(self, folder: Path, *, keep: int, protect: Protect = _none):
        if keep < 1:
            raise ValueError(f"checkpoint.keep={keep}: at least 1 checkpoint is kept")
        self.folder = folder
        self.keep = keep
        self.protect = protect
        self.last_committed: Path | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        sweep(folder)

    def reserve(self, *, weights: Tensors, optimizer: Tensors | None = None, ema: Tensors | None = None) -> None:
        """Take the memory for the copies now, so that the first save does not wait for the system to hand it out."""
        for part, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer), (EMA, ema)):
            for tensor in self._room(part, tensors or {}).values():
                tensor.zero_()

    def save(
        self,
        *,
        weights: Tensors,
        state: CheckpointState,
        optimizer: Tensors | None = None,
        ema: Tensors | None = None,
    ) -> None:
        """Copy the tensors to the CPU and return; the write goes on behind. Waits for the write before it, if any.

        Of those that are spread over the ranks this one gathers the whole; the others call `join_gathering` meanwhile,
        with weights, optimizer and ema in this order.
        """
        self.wait()
        copies = {
            "weights": self._copy(WEIGHTS, weights),
            "optimizer": self._copy(OPTIMIZER, optimizer or {}),
            "ema": self._copy(EMA, ema or {}),
        }
        # state is JSON text from here on: later changes to its dicts cannot reach the write
        state = replace(
            state, **json.loads(json.dumps({k: v for k, v in asdict(state).items() if isinstance(v, dict)}))
        )
        # A daemon: what `wait` did not wait for must not hold up the end of the process, and may be cut short.
        self._thread = threading.Thread(
            target=self._write, args=(copies, state), name=f"checkpoint-{state.step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the write under way; returns the newest folder this writer committed, or raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error
        return self.last_committed

    def _write(self, copies: dict[str, dict[str, Tensor]], state: CheckpointState) -> None:
        try:
            self.last_committed = self._save_or_make_room(copies, state)
            prune(self.folder, keep=self.keep, protect=self.protect)
        except BaseException as error:  # whatever it is: a thread's end is seen by nobody, and saving would just stop
            self._error = error

    def _save_or_make_room(self, copies: dict[str, dict[str, Tensor]], state: CheckpointState) -> Path:
        try:
            return save_checkpoint(self.folder, state=state, **copies)
        except CheckpointError as error:
            if self.keep == 1 or not is_disk_full(error.__cause__ or error):
                raise
        # The new one would push out the oldest anyway; take that room now, once.
        prune(self.folder, keep=self.keep - 1, protect=self.protect)
        return save_checkpoint(self.folder, state=state, **copies)

    def _room(self, part: str, tensors: Tensors) -> dict[str, Tensor]:
        before = self._copies.get(part, {})
        self._copies[part] = {
            name: room
            if (room := before.get(name)) is not None and (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
            else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for name, tensor in tensors.items()
        }
        return self._copies[part]

    def _copy(self, part: str, tensors: Tensors) -> dict[str, Tensor]:
        room = self._room(part, tensors)
        for name, tensor in tensors.items():
            if is_part(tensor):  # one after the other: all at once would not fit on a device that holds parts
                room[name].copy_(whole(tensor), non_blocking=True)
        here = {name: tensor.detach() for name, tensor in tensors.items() if not is_part(tensor)}
        if here:
            targets = [room[name] for name in here]
            torch._foreach_copy_(targets, list(here.values()), non_blocking=True)  # pyright: ignore
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return room


def free_bytes_needed(*parts: Tensors | None, keep: int, folder: Path) -> int:
    """Room that checkpoints of these tensors still take: `keep` and the one being written, less those in `folder`."""
    one = sum(tensor.nbytes for tensors in parts for tensor in (tensors or {}).values())
    there = sum(file.stat().st_size for path in committed_dirs(folder) for file in path.iterdir())
    return max(one, (keep + 1) * one - there) + (1 << 20)
