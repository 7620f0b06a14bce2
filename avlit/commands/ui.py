"""`just ui`: MLflow's page with all runs, on this machine only: nested, named, with columns that were chosen."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avlit.commands.compare import FOLDER as COMPARISONS
from avlit.errors import UserError
from avlit.runs import find_run, stages_of
from avlit.settings import nearest, read_words

if TYPE_CHECKING:
    from avlit.tracking.story import Experiment

WORDS = ("port", "runs_dir", "tracking.uri", "send")
MOST_LINKS = 5


def main(words: Sequence[str]) -> int:
    """`port=5000` (the next free one where it is taken), `tracking.uri=` (another store), `runs_dir=runs`,
    `send=RUN` (one that was trained with tracking.uri=offline, a curriculum with its stages: is sent to the store).

    Sends first what waits in the runs' spools, for example after a crash, and writes into the store what each run is a
    part of; prints links to the tables of training runs, which MLflow's first page hides behind another view.
    """
    given = read_words(words)
    for key in given:
        if key not in WORDS:
            raise UserError(f"{key}: no such word; did you mean {nearest(key, list(WORDS)) or ', '.join(WORDS)}?")
    port_word = str(given.get("port", 5000))
    if not port_word.isdecimal() or not 0 < int(port_word) < 65536:
        raise UserError(f"port={port_word}: must be a number from 1 to 65535")

    from avlit.tracking import OFFLINE, replay_all, store_uri, track_offline_run
    from avlit.tracking.server import HOST, free_port, start_server, stop_server, wait_until_up
    from avlit.tracking.story import tell

    uri = given.get("tracking.uri")
    store = store_uri(str(uri) if uri else None)
    if store == OFFLINE:
        raise UserError("tracking.uri=offline: is no store, and has no page; leave it out, or name a file or a server")
    runs_dir = Path(str(given.get("runs_dir", "runs")))
    if "send" in given:
        run = find_run(runs_dir, str(given["send"]))
        for each in [run, *stages_of(run)]:
            print(track_offline_run(each, store=store) or f"{each.id} is in {store}")
    is_file = store.startswith("sqlite:///")
    for folder in (runs_dir, runs_dir / COMPARISONS):
        for message in replay_all(folder, store):
            print(message, file=sys.stderr)
    if not is_file:
        print(f"The runs are on a server of their own: {store}")
        print_links(tell(store, runs_dir), store)
        return 0
    path = Path(store.removeprefix("sqlite:///"))
    if not path.exists():
        raise UserError(f"{path}: no run has been tracked there yet; `just train recipe=…` makes one")
    port = free_port(int(port_word))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the server
    with tempfile.TemporaryFile() as log:
        server = start_server(store, port=port, log=log.fileno())
        try:
            experiments = tell(store, runs_dir)  # while the server starts
            if not wait_until_up(server, port):
                log.seek(0)
                raise UserError(
                    f"MLflow's page did not start on {store}:\n{log.read()[-2000:].decode(errors='replace')}"
                )
            print(f"MLflow's page: http://{HOST}:{port}   (Ctrl-C ends it)")
            print_links(experiments, f"http://{HOST}:{port}")
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            stop_server(server)


def print_links(experiments: Sequence[Experiment], address: str) -> None:
    """A line for each of the newest experiments: where its table of training runs is."""
    for experiment in experiments[:MOST_LINKS]:
        print(f"Training runs of {experiment.name}: {address.rstrip('/')}/{experiment.route}")
    if len(experiments) > MOST_LINKS:
        print(f"and {len(experiments) - MOST_LINKS} more experiments")
    sys.stdout.flush()
