"""What plain Lightning, torch, torchdata, webdataset and MLflow do that this project works around.

Each test claims what one would want. All fail today, strictly: one that begins to pass says that the workaround its
reason names can go. `raises` keeps a test from failing for another reason than the one it is about.
"""

import io
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

ROOT = Path(__file__).parents[1]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def worked_around(in_file: str, how: str, *, raises: type[BaseException] = AssertionError) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, raises=raises, reason=f"{in_file}: {how}")


class Stream:
    """Numbers 0, 1, 2, … with the state that Lightning saves and restores: how many were given out."""

    def __init__(self, stride: int = 1) -> None:
        self.place, self.stride = 0, stride

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            number, self.place = self.place, self.place + self.stride
            yield torch.tensor([float(number)])

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class SizedStream(Stream):
    def __len__(self) -> int:
        return 100


class Small(pl.LightningModule):
    """Notes the numbers it is trained on, and one random number a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.numbers: list[int] = []
        self.noise: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.numbers.append(int(batch))
        self.noise.append(float(torch.rand(())))
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


class SaveAt(pl.Callback):
    """Saves after a step, as a run that is killed later has done."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(
    module: Small,
    loader: Stream | pl.LightningDataModule,
    *,
    until: int,
    save_at: Path | None = None,
    resume: Path | None = None,
    **more: Any,
) -> Small:
    """Trains to step `until`; writes `save_at` after step 3, or goes on from `resume`."""
    callbacks: list[pl.Callback] = [SaveAt(3, save_at)] if save_at else []
    trainer = pl.Trainer(max_steps=until, callbacks=callbacks, enable_checkpointing=False, **QUIET | more)
    if isinstance(loader, pl.LightningDataModule):
        trainer.fit(module, datamodule=loader, ckpt_path=resume)
    else:
        trainer.fit(module, train_dataloaders=loader, ckpt_path=resume)
    return module


@worked_around("data/loader.py", "the loader has a length, that of the whole run")
def test_a_resumed_loader_without_a_length_goes_on_where_it_was(tmp_path: Path) -> None:
    train(Small(), Stream(), until=5, save_at=tmp_path / "last.ckpt")
    assert train(Small(), Stream(), until=6, resume=tmp_path / "last.ckpt").numbers == [3, 4, 5]


class AsksForItsLength(Small):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@worked_around("avlit/module.py", "the schedule's length comes from the config, train.steps")
def test_asking_for_the_number_of_steps_keeps_the_data_state(tmp_path: Path) -> None:
    train(AsksForItsLength(), SizedStream(), until=5, save_at=tmp_path / "last.ckpt", max_epochs=1)
    resumed = train(AsksForItsLength(), SizedStream(), until=6, resume=tmp_path / "last.ckpt", max_epochs=1)
    assert resumed.numbers == [3, 4, 5]


def test_a_resumed_loader_with_a_length_goes_on_where_it_was(tmp_path: Path) -> None:
    """Holds: what the two above differ from in one thing each."""
    train(Small(), SizedStream(), until=5, save_at=tmp_path / "last.ckpt", max_epochs=1)
    resumed = train(Small(), SizedStream(), until=6, resume=tmp_path / "last.ckpt", max_epochs=1)
    assert resumed.numbers == [3, 4, 5]


TWO_RANKS = """
import sys
from pathlib import Path
import lightning.pytorch as pl
from tests.test_lightning_canaries import SizedStream, Small, train

class OfItsRank(pl.LightningDataModule):
    def train_dataloader(self):
        return SizedStream(stride=self.trainer.global_rank + 1)  # as shards of different sizes do

class Report(Small):
    def on_train_end(self):
        print(self.global_rank, self.numbers, flush=True)

path = Path(sys.argv[1])
two = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
train(Report(), OfItsRank(), until=5, save_at=path, **two)
train(Report(), OfItsRank(), until=4, resume=path, **two)
"""


@worked_around("data/order.py", "the data state is one integer, the same on every rank")
def test_every_rank_finds_its_own_data_state_again(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TWO_RANKS, tmp_path / "last.ckpt"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr)
    assert {"0 [3]", "1 [6]"} <= set(done.stdout.splitlines())


@worked_around("avlit/randomness.py", "random numbers are a function of seed, step and slot")
def test_a_resumed_run_draws_the_random_numbers_of_the_uninterrupted_one(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    whole = train(Small(), SizedStream(), until=6, save_at=tmp_path / "last.ckpt")
    pl.seed_everything(0, verbose=False)
    resumed = train(Small(), SizedStream(), until=6, resume=tmp_path / "last.ckpt")
    assert resumed.noise == whole.noise[3:]


class NotANumberOnce(Small):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return super().training_step(batch, index) * (math.nan if index == 2 else 1.0)


@worked_around("avlit/module.py", "an update that is not finite is left out and counted")
def test_one_loss_that_is_not_a_number_does_not_end_in_the_saved_weights(tmp_path: Path) -> None:
    train(NotANumberOnce(), SizedStream(), until=5, save_at=tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@worked_around("avlit/commit.py", "every file and folder is synced before a checkpoint counts")
def test_a_saved_checkpoint_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    train(Small(), SizedStream(), until=4, save_at=tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").is_file() and synced


class Interrupted(Small):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        raise KeyboardInterrupt


@worked_around("callbacks/stopping.py", "a handler of its own: the step is finished and saved", raises=SystemExit)
def test_ctrl_c_reaches_the_caller_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning would leave this process deaf to Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(), SizedStream(), until=1)


TERMINATED = """
import os, signal, sys
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.test_lightning_canaries import QUIET, SizedStream, Small

class Terminated(Small):
    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

saving = ModelCheckpoint(sys.argv[1], every_n_train_steps=50, save_last=True)
pl.Trainer(max_steps=20, callbacks=[saving], **QUIET).fit(Terminated(), train_dataloaders=SizedStream())
print("went on")
"""


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Path]]:
    """Exit status and checkpoints of a run that got SIGTERM at step 3 of 20."""
    folder = tmp_path_factory.mktemp("terminated")
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED, folder], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if "went on" in done.stdout or "Error" in done.stderr:
        raise RuntimeError(f"SIGTERM did not end it: {done.stdout}{done.stderr}")
    return done.returncode, list(folder.iterdir())


@worked_around("avlit/commands/train.py", "128 + the signal's number")
def test_sigterm_is_told_by_the_exit_status(terminated: tuple[int, list[Path]]) -> None:
    assert terminated[0] in (128 + signal.SIGTERM, -signal.SIGTERM)


@worked_around("callbacks/stopping.py", "saves after the step under way")
def test_sigterm_leaves_a_checkpoint(terminated: tuple[int, list[Path]]) -> None:
    assert terminated[1]


def weights(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((1000,), value), "bias": torch.full((1000,), value)}


@worked_around("avlit/commit.py", "a folder is written beside its place and renamed, and a name is never written twice")
def test_a_distributed_checkpoint_killed_while_written_again_is_not_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise ProcessLookupError

    save_distributed(weights(1.0), checkpoint_id=tmp_path, no_dist=True)
    monkeypatch.setattr(FileSystemWriter, "finish", killed)  # between the tensors and `.metadata`
    with pytest.raises((ProcessLookupError, CheckpointException)):
        save_distributed(weights(2.0), checkpoint_id=tmp_path, no_dist=True)
    monkeypatch.undo()
    found = weights(0.0)
    load_distributed(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["weight"], weights(1.0)["weight"])


def save_torch(folder: Path) -> Path:
    torch.save(weights(1.0), folder / "weights.pt")
    return folder / "weights.pt"


def load_torch(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def save_safetensors(folder: Path) -> Path:
    save_file(weights(1.0), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def load_safetensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def save_dcp(folder: Path) -> Path:
    save_distributed(weights(1.0), checkpoint_id=folder, no_dist=True)
    return next(folder.glob("*.distcp"))


def load_dcp(folder: Path) -> dict[str, Tensor]:
    found = weights(0.0)
    load_distributed(found, checkpoint_id=folder, no_dist=True)
    return found


@pytest.mark.parametrize(
    ("save", "load"),
    [(save_torch, load_torch), (save_safetensors, load_safetensors), (save_dcp, load_dcp)],
    ids=["torch", "safetensors", "dcp"],
)
@worked_around("avlit/commit.py", "a manifest has the checksum of every file")
def test_a_flipped_bit_is_noticed(tmp_path: Path, save: Any, load: Any) -> None:
    path: Path = save(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1000).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(content)
    try:
        found = load(tmp_path)
    except (RuntimeError, OSError, ValueError):
        return
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(1.0).items())


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@worked_around("avlit/checkpoints.py", "tensors are safetensors and the rest is JSON; a folder of shards is never read")
def test_a_distributed_checkpoint_runs_no_code_when_it_is_loaded(tmp_path: Path) -> None:
    save_dcp(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with suppress(CheckpointException):
        load_dcp(tmp_path)
    assert not (tmp_path / "canary").exists()


def write_tar(path: Path, *, suffix: str, contents: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number:04d}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@worked_around("data/sample.py", "a sample is safetensors and JSON, and no other member is opened")
def test_a_shard_runs_no_code_when_it_is_read(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    write_tar(tmp_path / "a.tar", suffix="pyd", contents=[pickle.dumps(Canary(tmp_path / "canary"))])
    for _ in WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode():  # pyright: ignore[reportGeneralTypeIssues]
        pass
    assert not (tmp_path / "canary").exists()


@worked_around("data/shard_index.py", "an index beside the shard says how many samples it has, and their checksums")
def test_a_shard_that_was_cut_short_is_noticed(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    write_tar(tmp_path / "a.tar", suffix="txt", contents=[b"x" * 512] * 10)
    with open(tmp_path / "a.tar", "r+b") as file:
        file.truncate(6 * 1024)  # a header and a block each
    try:
        found = len(list(WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)))
    except (OSError, ValueError, tarfile.TarError):
        return
    assert found == 10


def threads_of_a_new_thread() -> int:
    counted: list[int] = []
    thread = threading.Thread(target=lambda: counted.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counted[0]


@worked_around("data/read_ahead.py", "a thread of our own reads ahead")
def test_reading_in_threads_leaves_torch_its_own() -> None:
    from torchdata.nodes import IterableWrapper, ParallelMapper

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        nodes = ParallelMapper(IterableWrapper(range(4)), abs, num_workers=1, method="thread")
        nodes.reset()
        for _ in nodes:
            pass
        assert threads_of_a_new_thread() == 2
    finally:
        torch.set_num_threads(before)


WORKER_KILLED = """
import multiprocessing, os, signal, time
from torchdata.nodes import IterableWrapper, ParallelMapper

if __name__ == "__main__":
    nodes = ParallelMapper(IterableWrapper(range(100)), abs, num_workers=1, method="process", max_concurrent=1)
    nodes.reset()
    next(nodes)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    print("killed", flush=True)
    try:
        for _ in range(99):
            next(nodes)
    finally:
        print("noticed", flush=True)
        os._exit(0)
"""


@worked_around("data/worker_pool.py", "an executor, which says that a worker died")
def test_a_killed_reading_process_is_noticed() -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER_KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "killed\n":
                raise RuntimeError("no worker was killed")
            assert select.select([process.stdout], [], [], 3.0)[0], "still waiting"
        finally:
            process.kill()


@worked_around("avlit/tracking/spool.py", "training writes to a local file; another process sends it")
def test_an_mlflow_server_that_is_away_does_not_end_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # else it takes minutes to fail
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.exceptions import MlflowException

    try:
        logger = MLFlowLogger("films", tracking_uri="http://127.0.0.1:9")  # nothing listens there
        train(Small(), SizedStream(), until=1, logger=logger)
    except (MlflowException, OSError) as error:
        raise AssertionError("the run ended with its server") from error


@worked_around("avlit/tracking/tracker.py", "store_uri refuses a folder as the store")
def test_points_sent_twice_to_a_folder_stand_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as older versions, which kept runs in ./mlruns
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "mlruns").as_uri())
    run = client.create_run(client.create_experiment("films")).info.run_id
    for _ in range(2):
        client.log_batch(run, metrics=[Metric("loss", 0.5, 1000, 1)])
    assert len(client.get_metric_history(run, "loss")) == 1
