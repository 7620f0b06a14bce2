"""Tracking: every point arrives once, whatever happens to the store or to training; training never waits for it."""

import errno
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import avlit.commands.ui
from avlit.errors import UserError
from avlit.runs import create_run
from avlit.tracking import Tracker, git_revision, open_parent, replay, replay_all, store_uri, track_offline_run
from avlit.tracking.lookup import tagged_ids
from avlit.tracking.sender import Sender
from avlit.tracking.server import free_port, start_server, stop_server, wait_until_up
from avlit.tracking.spool import Progress, pending_bytes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: making one takes MLflow seconds, copying it none."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    run = create_run(path.parent / "runs", "none")
    idle = pytest.MonkeyPatch()
    idle.setattr(Tracker, "_start_sender", do_not_send)
    Tracker(run, uri=f"sqlite:///{path}").close()
    assert replay(run) == ""
    idle.undo()
    return path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> str:
    shutil.copy(template, tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for table in ("tags", "runs", "experiments"):
            database.execute(f"DELETE FROM {table} WHERE 1 {'AND experiment_id > 0' if table == 'experiments' else ''}")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def do_not_send(_: Tracker) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


@pytest.fixture
def unsent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tracked stays in the spool until the test replays it."""
    monkeypatch.setattr(Tracker, "_start_sender", do_not_send)


def rows(store: str, query: str) -> list[tuple]:
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        return database.execute(query).fetchall()


def points(store: str, name: str) -> list[tuple[int, float]]:
    return sorted(rows(store, f"SELECT step, value FROM metrics WHERE key = '{name}'"))


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log_metrics({"train/loss/video": step * 0.5, "train/lr": 1e-3}, step)


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, step * 0.5) for step in steps]


def test_a_run_arrives_whole_in_the_store(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path / "runs", "mtv_stage3")
    run.write_config("seed: 3\noptimizer:\n  lr: 0.001\n  betas: [0.9, 0.95]\ncaption: " + "x" * 900 + "\n")
    (run.samples_dir / "clip.mp4").write_bytes(b"clip")
    tracker = Tracker(run, uri=store, experiment="films", run_name="first", tags={"size": "tiny"})
    tracker.log_config(run.config_path.read_text())
    log(tracker, range(700))
    tracker.log_metrics({"train/bad": float("nan")}, 5)
    tracker.log_artifact(run.samples_dir / "clip.mp4", folder="samples/step-1")
    tracker.finish("finished", timeout_s=60)

    assert pending_bytes(run) == 0, (run.spool_dir / "sender.log").read_text()
    assert points(store, "train/loss/video") == expected(range(700))
    assert rows(store, "SELECT step, is_nan FROM metrics WHERE key = 'train/bad'") == [(5, 1)]
    ((run_id, name, status, artifacts),) = rows(store, "SELECT run_uuid, name, status, artifact_uri FROM runs")
    assert (name, status, run.record().mlflow_run) == ("first", "FINISHED", run_id)
    params, tags = (dict(rows(store, f"SELECT key, value FROM {table}")) for table in ("params", "tags"))
    assert (params["seed"], params["optimizer.lr"], params["optimizer.betas"]) == ("3", "0.001", "[0.9, 0.95]")
    assert len(params["caption"]) == 500 and "900 characters, see config.yaml" in params["caption"]
    assert (tags["avlit_id"], tags["recipe"], tags["size"]) == (run.id, "mtv_stage3", "tiny")
    assert tags["git_revision"] == git_revision().revision
    kept = Path(artifacts.removeprefix("file://"))
    assert kept.is_relative_to(tmp_path / "mlruns" / "films")
    assert (kept / "samples/step-1/clip.mp4").read_bytes() == b"clip"
    assert (kept / "config.yaml").read_text() == run.config_path.read_text()
    assert (run.spool_dir / "sender.log").read_text() == ""


@pytest.fixture
def server_port(store: str, tmp_path: Path) -> Iterator[tuple[int, list]]:
    servers: list[subprocess.Popen[bytes]] = []
    yield free_port(20000 + os.getpid() % 20000), servers
    for server in servers:
        stop_server(server)


def test_a_server_that_is_down_then_killed_then_back_gets_every_point_once(
    store: str, tmp_path: Path, server_port: tuple[int, list]
) -> None:
    port, servers = server_port

    def start() -> None:
        with open(tmp_path / "server.log", "ab") as output:
            servers.append(start_server(store, port=port, log=output.fileno()))
        assert wait_until_up(servers[-1], port), (tmp_path / "server.log").read_text()

    run = create_run(tmp_path / "runs", "mtv_stage1")
    tracker = Tracker(run, uri=f"http://127.0.0.1:{port}")
    log(tracker, range(300))
    start()
    log(tracker, range(300, 600))
    deadline = time.monotonic() + 60
    while len(points(store, "train/lr")) < 300 and time.monotonic() < deadline:
        time.sleep(0.05)
    log(tracker, range(600, 700))
    os.killpg(servers[-1].pid, signal.SIGKILL)  # in the middle of sending
    servers.pop().wait()
    log(tracker, range(700, 900))
    start()
    tracker.finish("finished", timeout_s=60)

    assert pending_bytes(run) == 0, Progress.read(run.spool_dir).error
    for name in ("train/loss/video", "train/lr"):
        assert Counter(step for step, _ in points(store, name)) == Counter(range(900))
    assert rows(store, "SELECT status FROM runs") == [("FINISHED",)]


KILLED_IN_TRAINING = """
import os, signal, sys, time
from pathlib import Path
from avlit.runs import find_run
from avlit.tracking import Tracker
from tests.test_tracking import log
tracker = Tracker(find_run(Path(sys.argv[1]), "last"), uri=sys.argv[2])
log(tracker, range(200))
print("logged", flush=True)
sys.stdin.readline()
log(tracker, range(200, 300))
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_for_points(store: str, least: int) -> None:
    deadline = time.monotonic() + 60
    while len(points(store, "train/lr")) < least and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(points(store, "train/lr")) >= least


def test_a_server_that_hangs_and_flaps_while_training_is_killed_and_resumed_gets_every_point_once(
    store: str, tmp_path: Path, server_port: tuple[int, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # given up here, and done by the server all the same later
    port, servers = server_port
    uri = f"http://127.0.0.1:{port}"

    def start() -> None:
        with open(tmp_path / "server.log", "ab") as output:
            servers.append(start_server(store, port=port, log=output.fileno()))
        assert wait_until_up(servers[-1], port), (tmp_path / "server.log").read_text()

    def signal_server(number: int) -> None:
        os.killpg(servers[-1].pid, number)

    start()
    run = create_run(tmp_path / "runs", "mtv_stage1")
    words = [sys.executable, "-c", KILLED_IN_TRAINING, tmp_path / "runs", uri]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdin is not None and training.stdout is not None
        assert training.stdout.readline() == "logged\n"
        wait_for_points(store, 1)
        signal_server(signal.SIGSTOP)
        training.stdin.write("go on\n")
        training.stdin.close()
        assert training.wait(60) == -signal.SIGKILL
    time.sleep(2.5)  # its sender has asked the hanging server, and given up
    signal_server(signal.SIGCONT)
    wait_for_points(store, 200)
    signal_server(signal.SIGKILL)
    servers.pop().wait()

    resumed = Tracker(run, uri=uri, is_resumed=True)  # from the checkpoint of step 250, with the server away
    log(resumed, range(250, 400))
    start()
    wait_for_points(store, 301)
    log(resumed, range(400, 450))
    signal_server(signal.SIGSTOP)
    log(resumed, range(450, 500))
    time.sleep(1.5)
    signal_server(signal.SIGCONT)
    resumed.finish("finished", timeout_s=60)

    assert pending_bytes(run) == 0, Progress.read(run.spool_dir).error
    assert points(store, "train/loss/video") == expected(range(500))
    assert len(rows(store, "SELECT 1 FROM runs")) == 1
    assert Progress.read(run.spool_dir).refused == []


@pytest.mark.usefixtures("unsent")
def test_a_store_that_another_process_locks_gets_every_point_once(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    tracker = Tracker(run, uri=store)
    log(tracker, range(5))
    sender = Sender(run)
    assert sender.advance()
    log(tracker, range(5, 20))
    tracker.close()
    path = store.removeprefix("sqlite:///")
    with sqlite3.connect(path, isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN EXCLUSIVE")
        release = threading.Timer(2.0, other.execute, ["ROLLBACK"])
        release.start()
        assert sender.advance() or sender.advance()
        release.join()
    other.close()
    assert points(store, "train/loss/video") == expected(range(20))


@pytest.mark.usefixtures("unsent")
def test_a_run_folder_from_elsewhere_sends_no_file_from_outside_of_it(store: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    run = create_run(tmp_path / "runs", "mtv_stage1")
    tracker = Tracker(run, uri=store, experiment="../../films")
    with pytest.raises(ValueError, match="only files in the run's folder"):
        tracker.log_artifact(tmp_path / "secret")
    (run.samples_dir / "link").symlink_to(tmp_path / "secret")
    with open(run.spool_dir / "artifacts.jsonl", "a") as file:
        for name in ("../../secret", str(tmp_path / "secret"), "samples/link"):
            file.write(json.dumps({"file": name, "to": ""}) + "\n")
        file.write(json.dumps({"file": "run.json", "to": "../../../elsewhere"}) + "\n")
    log(tracker, range(3))
    tracker.close()
    assert "4 records were refused" in replay(run)
    assert pending_bytes(run) == 0 and points(store, "train/loss/video") == expected(range(3))
    ((artifacts,),) = rows(store, "SELECT artifact_uri FROM runs")
    assert Path(artifacts.removeprefix("file://")).resolve().is_relative_to(tmp_path / "mlruns")
    assert not list(tmp_path.rglob("elsewhere"))
    assert not [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("unsent")
@pytest.mark.parametrize(
    "line",
    [
        '{"m": 3, "s": 1, "t": 1}',
        '{"m": {"a": "x"}, "s": 1, "t": 1}',
        '{"m": {"a": 1.0}, "s": 1e999, "t": 1}',
        '{"m": {"a": 1.0}, "s": ' + "9" * 40 + ', "t": 1}',
        '{"open": {"store": 3}}',
        '{"tags": {"a": 1}}',
        '{"end": "EVIL", "t": 1}',
        "[" * 50_000,
        "3",
    ],
    ids=lambda line: line[:30],
)
def test_a_senseless_record_is_named_and_holds_up_nothing(store: str, tmp_path: Path, line: str) -> None:
    run = create_run(tmp_path / "runs", "mtv_stage1")
    tracker = Tracker(run, uri=store)
    log(tracker, range(2))
    with open(run.spool_dir / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    log(tracker, range(2, 4))
    tracker.close()
    assert "1 records were refused, e.g. not a record" in replay(run)
    assert points(store, "train/loss/video") == expected(range(4))


@pytest.mark.usefixtures("unsent")
@pytest.mark.parametrize("text", ["{", '{"sent": {"metrics.jsonl": -5}}', "[" * 50_000, '{"sent": 3}'])
def test_a_damaged_note_of_what_was_sent_sends_again_and_doubles_nothing(store: str, tmp_path: Path, text: str) -> None:
    run = create_run(tmp_path / "runs", "mtv_stage1")
    tracker = Tracker(run, uri=store)
    log(tracker, range(5))
    tracker.close()
    assert replay(run) == ""
    (run.spool_dir / "drained.json").write_text(text)
    assert replay(run) == ""
    assert points(store, "train/loss/video") == expected(range(5))


def test_a_hanging_server_does_not_hold_up_the_end_of_a_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run = create_run(tmp_path, "mtv_stage1")
        tracker = Tracker(run, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        log(tracker, range(10))
        with silent.accept()[0]:  # it has been asked, and never answers
            message = tracker.close(timeout_s=0.5)
    assert f"have not reached the store (see sender.log there); they wait in {run.spool_dir}" in message
    assert "just ui" in message


KILLED = """
import os, signal, sys
from pathlib import Path
from avlit.runs import find_run
from avlit.tracking import Tracker
from tests.test_tracking import log
tracker = Tracker(find_run(Path(sys.argv[1]), "last"), uri=sys.argv[2])
log(tracker, range(500))
os.kill(tracker._sender.pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_replay_completes_what_a_killed_run_left(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, store], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with open(run.spool_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"t": 17')  # the line it was writing

    assert replay(run) == ""
    assert points(store, "train/loss/video") == expected(range(500))
    assert replay(run) == ""
    assert points(store, "train/loss/video") == expected(range(500))


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("unsent")
@pytest.mark.parametrize("moment", ["write", "log_batch"])
def test_a_sender_killed_after_sending_and_before_noting_it_doubles_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    tracker = Tracker(run, uri=store)
    log(tracker, range(600))
    tracker.log_metrics({"train/bad": float("nan"), "train/worse": float("inf")}, 0)
    tracker.close()

    first = Sender(run)
    first._attach()
    if moment == "write":
        monkeypatch.setattr(Progress, "write", lambda *_: (_ for _ in ()).throw(Killed()))
    else:
        real, calls = first.client.log_batch, []

        def killed_after_the_second(*arguments: object, **keywords: object) -> None:
            real(*arguments, **keywords)  # pyright: ignore[reportArgumentType]
            calls.append(1)
            if len(calls) == 3:
                raise Killed

        monkeypatch.setattr(first.client, "log_batch", killed_after_the_second)
    with pytest.raises(Killed):
        first.advance()
    monkeypatch.undo()
    sent = len(points(store, "train/lr"))
    assert sent > 0 and Progress.read(run.spool_dir).sent["metrics.jsonl"] == 0

    assert replay(run) == ""
    assert points(store, "train/loss/video") == expected(range(600))
    assert len(points(store, "train/lr")) == 600
    assert [len(points(store, name)) for name in ("train/bad", "train/worse")] == [1, 1]


@pytest.mark.usefixtures("unsent")
def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_repeating_steps(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    first = Tracker(run, uri=store)
    log(first, range(25))  # killed after step 24; its last checkpoint is of step 20
    first.close()
    resumed = Tracker(run, uri=store, is_resumed=True)
    log(resumed, range(20, 40))
    resumed.finish("finished")
    assert replay(run) == ""
    assert points(store, "train/loss/video") == expected(range(40))

    later = Tracker(run, uri=store)  # not a resume: the same step again is a new measurement
    later.log_metrics({"train/loss/video": 7.0}, 39)
    later.close()
    replay(run)
    assert points(store, "train/loss/video")[39:] == [(39, 7.0), (39, 19.5)]
    assert len(rows(store, "SELECT 1 FROM runs")) == 1


@pytest.mark.usefixtures("unsent")
def test_what_a_changed_run_does_again_is_a_new_measurement(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    first = Tracker(run, uri=store)
    log(first, range(10))
    first.close()
    changed = Tracker(run, uri=store, is_resumed=True, redone_from=6)  # another learning rate from step 6 on
    for step in range(5, 9):
        changed.log_metrics({"train/loss/video": 100.0 + step}, step)
    changed.close()
    assert replay(run) == ""
    assert points(store, "train/loss/video") == sorted([*expected(range(10)), (7, 107.0), (8, 108.0)])


@pytest.mark.usefixtures("unsent")
def test_a_failure_in_the_middle_of_old_and_resumed_points_loses_none(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    for is_resumed, steps in ((False, range(25)), (True, range(20, 40))):
        tracker = Tracker(run, uri=store, is_resumed=is_resumed)
        log(tracker, steps)
        tracker.close()
    sender = Sender(run)

    def away(*_: object, **keywords: object) -> None:
        if "metrics" in keywords:
            raise ConnectionError("the store went away")

    monkeypatch.setattr(sender.client, "log_batch", away)
    assert not sender.advance()
    assert Progress.read(run.spool_dir).error == "ConnectionError: the store went away"
    monkeypatch.undo()
    assert sender.advance()
    assert points(store, "train/loss/video") == expected(range(40))
    assert Progress.read(run.spool_dir).error == ""


@pytest.mark.usefixtures("unsent")
def test_stages_are_children_of_their_curriculum_whoever_is_sent_first(store: str, tmp_path: Path) -> None:
    parent = create_run(tmp_path, "mtv_curriculum")
    children = [create_run(tmp_path, recipe, parent=parent.id) for recipe in ("mtv_stage1", "mtv_stage2")]
    trackers = [open_parent(parent, uri=store), *(Tracker(child, uri=store) for child in children)]
    for tracker in trackers:
        tracker.log_metrics({"val/lip_sync": 0.5}, 1)
        tracker.close()
    for run in (children[0], parent, children[1]):
        assert replay(run) == ""

    assert len(rows(store, "SELECT 1 FROM runs")) == 3
    found = rows(store, "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = "
                        f"'{parent.record().mlflow_run}'")  # fmt: skip
    assert sorted(run_id for (run_id,) in found) == sorted(str(child.record().mlflow_run) for child in children)


@pytest.mark.usefixtures("unsent")
def test_what_the_store_will_never_take_is_named_and_holds_up_nothing(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    tracker = Tracker(run, uri=store)
    tracker.log_params({"lr": 1, "bad\nkey": 2})
    tracker.log_params({"lr": 3})
    tracker.log_artifact(run.samples_dir / "gone.mp4")
    log(tracker, range(3))
    tracker.close()
    message = replay(run)

    assert "2 records were refused" in message and "bad\nkey=2" in message
    assert any("gone.mp4: the file is gone" in reason for reason in Progress.read(run.spool_dir).refused)
    assert points(store, "train/loss/video") == expected(range(3))
    assert rows(store, "SELECT value FROM params WHERE key = 'lr'") == [("1",)]
    assert rows(store, "SELECT value FROM tags WHERE key = 'changed.lr'") == [("3",)]


@pytest.mark.usefixtures("unsent")
def test_a_deleted_mlflow_run_is_made_again_with_all_its_points(store: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    tracker = Tracker(run, uri=store)
    log(tracker, range(5))
    sender = Sender(run)
    assert sender.advance()
    sender.client.delete_run(sender.progress.run)
    log(tracker, range(5, 8))
    tracker.close()

    assert not sender.advance()
    assert sender.advance()
    alive = rows(store, "SELECT step FROM metrics JOIN runs USING (run_uuid) "
                        "WHERE lifecycle_stage = 'active' AND key = 'train/lr'")  # fmt: skip
    assert sorted(step for (step,) in alive) == list(range(8))


@pytest.mark.usefixtures("unsent")
def test_a_full_disk_costs_points_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    tracker = Tracker(run, uri=f"sqlite:///{tmp_path / 'none.db'}")
    real = os.write

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    log(tracker, range(3))
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:20]))  # room for half a line
    log(tracker, range(3, 4))
    monkeypatch.undo()
    log(tracker, range(4, 6))
    tracker.finish("failed")

    assert "4 records could not be written" in capsys.readouterr().err
    lines = (run.spool_dir / "metrics.jsonl").read_text().splitlines()
    assert [line[line.index('"s"') : line.index(',"m"')] for line in lines if '"m"' in line] == ['"s":4', '"s":5']


def test_importing_tracking_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, avlit.tracking, avlit.commands.ui; print([n for n in ('mlflow', 'torch') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_an_inactive_tracker_writes_nothing(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mtv_stage1")
    tracker = Tracker(run, is_active=False)
    log(tracker, range(3))
    tracker.log_artifact(run.path / "run.json")
    tracker.finish("finished")
    assert list(run.spool_dir.iterdir()) == []


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/../b", "a\nb", "a:b"])
def test_a_name_that_a_store_would_refuse_is_refused_at_once(tmp_path: Path, unsent: None, name: str) -> None:
    tracker = Tracker(create_run(tmp_path, "mtv_stage1"), uri=f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(ValueError, match="a name is words"):
        tracker.log_metrics({name: 1.0}, 0)
    tracker.close()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlruns", "a folder cannot be the store; use sqlite:///FILE"),
        ("file:///tmp/mlruns", "a folder cannot be the store"),
        ("http://me:secret@host:5000", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_store_that_would_double_points_or_leak_a_password_is_refused(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        store_uri(uri)
    assert "secret" not in str(caught.value)


def test_the_default_store_is_a_file_in_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri(None) == store_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri("http://127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_a_run_without_a_store_keeps_its_points_for_a_store_it_is_sent_to_later(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = create_run(tmp_path / "runs", "mtv_stage1")
    untracked = Tracker(run, uri="offline")
    untracked.log_metrics({"train/lr": 0.5}, 1)
    untracked.log_artifact(run.config_path)
    assert untracked.close() == ""
    assert replay_all(tmp_path / "runs", store) == [] and points(store, "train/lr") == []
    with pytest.raises(UserError, match="is being trained"):
        track_offline_run(run, store=store)
    run.update(status="finished")
    assert track_offline_run(run, store=store) == ""
    assert points(store, "train/lr") == [(1, 0.5)]
    assert rows(store, "SELECT status FROM runs") == [("FINISHED",)]
    with pytest.raises(UserError, match="is there already"):
        track_offline_run(run, store="http://127.0.0.1:9")
    tracker = Tracker(run, uri=store, is_resumed=True)
    tracker.log_metrics({"train/lr": 0.5, "train/loss/video": 1.0}, 1)
    tracker.log_metrics({"train/lr": 0.25}, 2)
    assert tracker.close(timeout_s=120) == ""
    assert points(store, "train/lr") == [(1, 0.5), (2, 0.25)]


def test_git_revision_tells_a_clean_checkout_from_a_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    assert (git_revision(tmp_path).revision, git_revision(tmp_path).is_dirty) == ("unknown", None)
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "a")
    assert len(git_revision(tmp_path).revision) == 40 and git_revision(tmp_path).is_dirty is False
    (tmp_path / "a.py").write_text("2")
    assert git_revision(tmp_path).is_dirty is True
    monkeypatch.setenv("PATH", "")
    assert git_revision(tmp_path).revision == "unknown"


HEALTHY_ONCE = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).handle_request()
"""


def test_ui_sends_what_waits_and_serves_on_the_next_free_port(
    store: str, tmp_path: Path, unsent: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tmp_path / "runs", "mtv_stage1")
    tracker = Tracker(run, uri=store)
    log(tracker, range(5))
    tracker.log_metrics({"val/loss/video": 0.5}, 5)
    tracker.close()

    def start_stand_in(of: str, *, port: int, log: int) -> subprocess.Popen[bytes]:
        assert of == store
        words = [sys.executable, "-c", HEALTHY_ONCE, str(port)]
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    monkeypatch.setattr("avlit.tracking.server.start_server", start_stand_in)  # MLflow's own takes seconds: see above
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert avlit.commands.ui.main([f"port={port}", f"tracking.uri={store}", f"runs_dir={tmp_path}/runs"]) == 0
    out = capsys.readouterr().out
    address = out.split()[2]
    assert address.startswith("http://127.0.0.1:") and int(address.rsplit(":", 1)[1]) > port
    ((experiment, view),) = rows(store, "SELECT experiment_id, value FROM experiment_tags WHERE key LIKE '%.avlit'")
    assert f"{address}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=avlit" in out
    assert json.loads(view)["selectedColumns"] == ["tags.`story`", "metrics.`val/loss/video`"]
    assert rows(store, "SELECT value FROM tags WHERE key = 'story'") == [("alone, from scratch",)]
    assert tagged_ids(store, "recipe", "mtv_stage1") == [run.id] and tagged_ids(store, "recipe", "other") == []
    assert points(store, "train/loss/video") == expected(range(5)) and pending_bytes(run) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["port=x"], "port=x: must be a number"),
        (["prot=1"], "did you mean port"),
        ([], "no run has been tracked there"),
    ],
)
def test_ui_says_what_is_wrong(tmp_path: Path, words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "avlit", "ui", *words], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr


# A store is made whole or not at all


MAKE = "import pathlib, sys; from avlit.tracking.store import make_store; make_store(pathlib.Path(sys.argv[1]))"


def tables(path: Path) -> set[str]:
    with sqlite3.connect(path) as store:
        return {name for (name,) in store.execute("select name from sqlite_master where type = 'table'")}


def test_a_store_that_several_make_at_once_and_one_is_killed_making_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    first = subprocess.Popen([sys.executable, "-c", MAKE, path], cwd=ROOT)
    while first.poll() is None and not (tmp_path / "mlflow.db.part").exists():
        time.sleep(0.005)
    time.sleep(0.1)  # in the midst of its tables
    first.kill()
    assert first.wait() == -signal.SIGKILL and not path.exists() and (tmp_path / "mlflow.db.part").exists()
    others = [subprocess.Popen([sys.executable, "-c", MAKE, path], cwd=ROOT) for _ in range(3)]
    assert [each.wait() for each in others] == [0, 0, 0]
    assert {"runs", "metrics", "params", "tags", "experiments", "alembic_version"} <= tables(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
