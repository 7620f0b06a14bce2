"""What a checkpoint holds and how it is written and read; `commit` makes it whole, `inherit` puts it into a model.

`checkpoints/step-00000500/`: weights.safetensors, ema.safetensors (optional), optimizer.safetensors (optional),
state.json and COMMIT.json. Tensors are safetensors, the rest is JSON; nothing is ever unpickled. A model that is spread
over ranks is saved by all of them: of each file of tensors there is then a part a rank (`spread_tensors`).
"""

import json
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from avlit.checkpoint_state import CheckpointState, read_state
from avlit.commit import (
    PATIENCE_S,
    CheckpointError,
    Skipped,
    commit,
    committed_dirs,
    is_disk_full,
    remove,
    step_of,
    verify,
    write_part,
)
from avlit.spread_tensors import Place, SpreadTensors, part_name, save_part, whole_name

WEIGHTS, EMA, OPTIMIZER, STATE = "weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
FILES = (WEIGHTS, EMA, OPTIMIZER, STATE)
REQUIRED = (WEIGHTS, STATE)

Tensors = Mapping[str, Tensor]


class NonFiniteError(CheckpointError):
    """A tensor to be saved holds NaN or infinity; such a checkpoint is never committed."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed, verified checkpoint of the files that its manifest names; tensors are read when asked for."""

    path: Path
    state: CheckpointState
    files: tuple[str, ...]

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def has_ema(self) -> bool:
        return bool(self._files_of(EMA))

    def weights(self) -> Mapping[str, Tensor]:
        """The saved parameters by name."""
        return self._read(WEIGHTS)

    def ema(self) -> Mapping[str, Tensor]:
        """The averaged parameters by name; empty where the run kept no average."""
        return self._read(EMA)

    def averaged(self) -> Mapping[str, Tensor]:
        """The saved parameters by name, averaged where the run kept an average of them."""
        averaged, weights = self.ema(), self.weights()
        return ChainMap(averaged, weights)  # pyright: ignore[reportArgumentType] only ever read

    def optimizer(self) -> Mapping[str, Tensor]:
        """The optimizer's tensors, `<parameter>/<slot>`; `state.optimizer` is the rest of it."""
        return self._read(OPTIMIZER)

    def _files_of(self, name: str) -> list[str]:
        """The file of that name, or its parts; none where the checkpoint has neither."""
        return [file for file in self.files if whole_name(file) == name]

    def _read(self, name: str) -> Mapping[str, Tensor]:
        files = self._files_of(name)
        try:
            if files == [name]:
                return load_file(self.path / name)
            return SpreadTensors([self.path / file for file in files])
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error


@dataclass(frozen=True)
class Spread:
    """What makes a save one rank's share of it, where tensors are spread over the ranks.

    temporary: `commit.begin`'s folder on the first rank. places: file -> tensor -> where in the whole this rank's part
    of it begins; a file of which this rank has nothing is there all the same, empty. patience_s: see `commit`.
    """

    rank: int
    num_ranks: int
    temporary: Path
    places: Mapping[str, Mapping[str, Place]]
    patience_s: Callable[[], float] = lambda: PATIENCE_S


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
    if not weights:
        raise CheckpointError(f"{folder}: step {state.step} has no weights to save")
    files = {name: tensors for name, tensors in ((WEIGHTS, weights), (EMA, ema), (OPTIMIZER, optimizer)) if tensors}
    writers = _tensor_writers(files, state.step) | _state_writer(state)
    with _telling(folder, state.step, files):
        return commit(folder, state.step, writers)


def save_share(
    folder: Path, *, weights: Tensors, state: CheckpointState, optimizer: Tensors, ema: Tensors, spread: Spread
) -> Path | None:
    """As `save_checkpoint`, of this rank's share of the tensors; all ranks call it.

    The first commits what all wrote and returns the folder, the others None once theirs is durable.
    """
    all_files = {WEIGHTS: weights, EMA: ema, OPTIMIZER: optimizer}
    files = {name: all_files[name] for name in spread.places}
    writers = _part_writers(files, state.step, spread)
    with _telling(folder, state.step, files):
        if spread.rank:
            write_part(spread.temporary, spread.rank, writers)
            return None
        writers |= _state_writer(state)
        return commit(
            folder,
            state.step,
            writers,
            temporary=spread.temporary,
            num_ranks=spread.num_ranks,
            patience_s=spread.patience_s,
        )


@contextmanager
def _telling(folder: Path, step: int, files: Mapping[str, Tensors]) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        reason = "the disk is full" if is_disk_full(error) else str(error)
        raise CheckpointError(
            f"{folder}: step {step} ({need / 1e9:.2f} GB) could not be written: {reason}; "
            "checkpoints committed before are untouched"
        ) from error


def _state_writer(state: CheckpointState) -> dict[str, Callable[[Path], object]]:
    # NaN is written as such: sums of losses for the log may hold one from an update that was left out
    text = json.dumps(asdict(replace(state, versions=state.versions or versions())), indent=1)
    return {STATE: lambda path: path.write_text(text, encoding="utf-8")}


def _tensor_writers(files: Mapping[str, Tensors], step: int) -> dict[str, Callable[[Path], object]]:
    """What writes each file, the largest first: what is left to wait for at the end is the sync of the smallest."""

    def write(path: Path) -> None:
        check_finite(files[path.name], f"step {step}, {path.name}")
        save_file({key: tensor.contiguous() for key, tensor in files[path.name].items()}, path)

    by_size = sorted(files, key=lambda name: -sum(tensor.nbytes for tensor in files[name].values()))
    return dict.fromkeys(by_size, write)


def _part_writers(files: Mapping[str, Tensors], step: int, spread: Spread) -> dict[str, Callable[[Path], object]]:
    def write(path: Path, *, name: str) -> None:
        check_finite(files[name], f"step {step}, {path.name}")
        save_part(path, {key: tensor.contiguous() for key, tensor in files[name].items()}, spread.places[name])

    return {part_name(name, spread.rank + 1, of=spread.num_ranks): partial(write, name=name) for name in files}


def wrong_names(names: Collection[str]) -> str:
    """What is wrong with the names of a checkpoint's files, "" if nothing is: each whole, or in all of its parts."""
    for name in sorted(names):
        if whole_name(name) not in FILES:
            return f"lists {name!r}, which no checkpoint holds"
    for name in FILES:
        there = {file for file in names if whole_name(file) == name}
        if not there and name in REQUIRED:
            return f"does not list {name}"
        parts = {part_name(name, number, of=len(there)) for number in range(1, len(there) + 1)}
        if there and there not in ({name}, parts):
            return f"does not list all parts of {name}"
    return ""


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`, after comparing every byte with its manifest; CheckpointError says what is wrong."""
    files = verify(path, wrong_names=wrong_names)
    return Checkpoint(path, load_state(path), files)


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


def protect_none(steps: list[int]) -> Iterable[int]:
    """None besides the newest."""
    return ()


def prune(folder: Path, *, keep: int, protect: Protect = protect_none) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those that `protect` picks; returns what was removed.

    The last good one stays: nothing goes unless a newer one that is kept verifies in full. Damaged folders are not
    counted, and are left for their owner to look at.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.keep={keep}: at least 1 checkpoint is kept")
    whole: dict[int, Path] = {}
    for path in committed_dirs(folder):
        try:
            verify(path, wrong_names=wrong_names, is_quick=bool(whole))
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


def free_bytes_needed(*parts: Tensors | None, keep: int, folder: Path) -> int:
    """Room that checkpoints of these tensors still take: `keep` and the one being written, less those in `folder`."""
    one = sum(tensor.nbytes for tensors in parts for tensor in (tensors or {}).values())
    there = sum(file.stat().st_size for path in committed_dirs(folder) for file in path.iterdir())
    return max(one, (keep + 1) * one - there) + (1 << 20)
