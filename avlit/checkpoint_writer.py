"""Writes a run's checkpoints behind its training, on one process or on every rank that holds a part."""

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from avlit.checkpoints import (
    EMA,
    OPTIMIZER,
    WEIGHTS,
    CheckpointState,
    Protect,
    Spread,
    Tensors,
    protect_none,
    prune,
    save_checkpoint,
    save_share,
)
from avlit.commit import PATIENCE_S, CheckpointError, begin, is_disk_full, sweep
from avlit.ranks import gather, is_distributed, is_first, is_part, local, place_of


class CheckpointWriter:
    """Writes checkpoints in the background: training stops only while the state is copied.

    folder: a run's `checkpoints/`. keep, protect: what to retain, see `prune`. patience_s: how long other ranks may
    write nothing of their parts; may be lowered meanwhile.
    At most one write is under way; an error in it is raised by the next `save` or `wait`.
    """

    def __init__(self, folder: Path, *, keep: int, protect: Protect = protect_none):
        if keep < 1:
            raise ValueError(f"checkpoint.keep={keep}: at least 1 checkpoint is kept")
        self.folder = folder
        self.keep = keep
        self.protect = protect
        self.patience_s = PATIENCE_S
        self.last_committed: Path | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        sweep(folder)

    def reserve(self, *, weights: Tensors, optimizer: Tensors | None = None, ema: Tensors | None = None) -> None:
        """Take the memory for the copies now, so that the first save does not wait for the system to hand it out."""
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer), (EMA, ema)):
            room = self._room(name, {key: local(tensor) for key, tensor in _held(tensors or {}).items()})
            for tensor in room.values():
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

        Every rank must call it. Of tensors that are spread over the ranks each writes its parts; of others the first
        rank alone writes anything. An error of one rank is raised on all.
        """
        files = {name: tensors for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer), (EMA, ema)) if tensors}
        is_spread = is_distributed() and any(is_part(tensor) for tensor in weights.values())
        temporary = self._begin_together(state.step, files if is_spread else {})
        held = {name: _held(tensors) for name, tensors in files.items()}
        if not is_spread and not is_first():
            return
        spread = None
        if temporary:
            places = {name: {key: place_of(tensor) or () for key, tensor in held[name].items()} for name in files}
            spread = Spread(dist.get_rank(), dist.get_world_size(), temporary, places, lambda: self.patience_s)
        copies = {
            "weights": self._copy(WEIGHTS, held.get(WEIGHTS, {})),
            "optimizer": self._copy(OPTIMIZER, held.get(OPTIMIZER, {})),
            "ema": self._copy(EMA, held.get(EMA, {})),
        }
        # state is JSON text from here on: later changes to its dicts cannot reach the write
        state = replace(
            state, **json.loads(json.dumps({k: v for k, v in asdict(state).items() if isinstance(v, dict)}))
        )
        # A daemon: what `wait` did not wait for must not hold up the end of the process, and may be cut short.
        self._thread = threading.Thread(
            target=self._write, args=(copies, state, spread), name=f"checkpoint-{state.step}", daemon=True
        )
        self._thread.start()

    def _begin_together(self, step: int, files: Mapping[str, Tensors]) -> Path | None:
        """Wait for every rank's write before; the folder for the parts of `files`, if there are any."""
        error, temporary = None, None
        try:
            self.wait()
            if files and is_first():
                self._make_room(sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values()))
                temporary = begin(self.folder, step)
        except Exception as raised:
            error = raised
        told = gather((str(error) if error else "", temporary))
        if error:
            raise error
        if failed := [f"rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text]:
            raise CheckpointError(failed[0])
        return told[0][1]

    def _make_room(self, need_bytes: int) -> None:
        """Remove what the new one would push out anyway, where there is no room for it otherwise."""
        if self.keep > 1 and self.folder.is_dir() and shutil.disk_usage(self.folder).free < need_bytes:
            prune(self.folder, keep=self.keep - 1, protect=self.protect)

    def wait(self) -> Path | None:
        """Wait for the write under way; returns the newest folder this writer committed, or raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error
        return self.last_committed

    def _write(self, copies: dict[str, dict[str, Tensor]], state: CheckpointState, spread: Spread | None) -> None:
        try:
            if spread:
                committed = save_share(self.folder, state=state, spread=spread, **copies)
            else:
                committed = self._save_or_make_room(copies, state)
            if committed:
                self.last_committed = committed
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

    def _room(self, name: str, tensors: Tensors) -> dict[str, Tensor]:
        before = self._copies.get(name, {})
        self._copies[name] = {
            key: room
            if (room := before.get(key)) is not None and (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
            else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for key, tensor in tensors.items()
        }
        return self._copies[name]

    def _copy(self, name: str, tensors: Tensors) -> dict[str, Tensor]:
        here = {key: local(tensor.detach()) for key, tensor in tensors.items()}
        room = self._room(name, here)
        if here:
            torch._foreach_copy_(list(room.values()), list(here.values()), non_blocking=True)  # pyright: ignore
        if any(tensor.is_cuda for tensor in here.values()):
            torch.cuda.synchronize()
        return room


def _held(tensors: Tensors) -> dict[str, Tensor]:
    """Those of which this rank has something to save."""
    return {name: tensor for name, tensor in tensors.items() if place_of(tensor) is not None}
