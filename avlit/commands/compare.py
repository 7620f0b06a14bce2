"""`just compare`: runs side by side, as a table and as one page, which is an artifact of a comparison run in MLflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from avlit.comparison.selection import SELECTORS, select
from avlit.config import Config
from avlit.errors import ConfigError
from avlit.runs import Run, create_run
from avlit.settings import nearest, read_words

WORDS = ("runs_dir", "tracking.uri", "clips")
FOLDER = "comparisons"
"""Under `runs_dir`: a comparison is a run to MLflow, and none that `last` should mean."""
PAGE, TEXT, SINGLE = "comparison.html", "comparison.md", "single/comparison.html"
PATIENCE_S = 30.0


def main(words: Sequence[str]) -> int:
    """`run=RUN` twice or more: an id, its beginning or end, a name, a folder, `last:3`; a table or curriculum stands
    for its last runs. `tag=KEY=VALUE` and `experiment=NAME` mean all runs that have them.

    `clips=4` held-out clips are shown at most. `tracking.uri=`: the store that gets the page, by default the runs' own.
    """
    selectors = [(key, value) for word in words for key, _, value in [word.partition("=")] if key in SELECTORS]
    given = read_words([word for word in words if word.partition("=")[0] not in SELECTORS])
    for key in given:
        if key not in WORDS:
            known = (*SELECTORS, *WORDS)
            raise ConfigError(f"{key}: no such word; did you mean {nearest(key, list(known)) or ', '.join(known)}?")
    num_clips = given.get("clips", "4")
    if not (num_clips.isascii() and num_clips.isdigit()):
        raise ConfigError(f"clips={num_clips}: must be a whole number, 0 for none")
    runs_dir = Path(given.get("runs_dir", Config.runs_dir))

    from avlit.tracking import store_uri

    asked = given.get("tracking.uri")
    runs = select(runs_dir, selectors, store=store_uri(asked))
    folder = create_run(
        runs_dir / FOLDER,
        "comparison",
        config=json.dumps({letter_word(number): run.id for number, run in enumerate(runs)}, indent=1) + "\n",
    )
    status = "failed"
    try:
        made_in(folder, runs, asked=asked, num_clips=int(num_clips))
        status = "finished"
    finally:
        folder.update(status=status)
    return 0


def made_in(folder: Run, runs: Sequence[Run], *, asked: str | None, num_clips: int) -> None:
    """Compare, print, write the page into a comparison's folder, and send it to MLflow."""
    from rich.console import Console

    from avlit.comparison.comparison import compare
    from avlit.comparison.page import MEDIA, write_page, write_single_file
    from avlit.comparison.tables import markdown, print_tables
    from avlit.durable import write_atomically

    comparison = compare(runs, media=folder.path / MEDIA, num_clips=num_clips)
    write_page(comparison, folder.path / PAGE)
    write_atomically(folder.path / TEXT, markdown(comparison))
    (folder.path / SINGLE).parent.mkdir()
    write_single_file(comparison, folder.path / SINGLE, media=folder.path / MEDIA)
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    print_tables(comparison, console)
    print(f"\nThe page: {(folder.path / PAGE).as_uri()}", flush=True)
    send(folder, [each.name for each in comparison.subjects], runs, asked=asked)


def send(folder: Run, names: Sequence[str], runs: Sequence[Run], *, asked: str | None) -> None:
    """Make the comparison a run in MLflow, the page its artifact; what does not arrive waits, and that is said."""
    from avlit.tracking import OFFLINE, Tracker
    from avlit.tracking.history import read_session
    from avlit.tracking.story import TAG as STORY

    sessions = [session for run in runs if (session := read_session(run))]
    # Of runs with and without a store, where those with one are.
    session = next((each for each in sessions if each.store != OFFLINE), sessions[0] if sessions else None)
    uri = asked or store_of_runs(session.store if session else None)
    tracker = Tracker(
        folder,
        uri=uri,
        experiment=session.experiment if session else "avlit",
        run_name=f"comparison of {len(names)} runs",
        tags={
            "kind": "comparison",
            STORY: f"compares {' · '.join(names)}",
            "mlflow.note.content": (folder.path / TEXT).read_text(encoding="utf-8"),
        },
    )
    tracker.log_params({letter_word(number): run.id for number, run in enumerate(runs)})
    tracker.log_artifact(folder.path / SINGLE)
    tracker.log_artifact(folder.path / TEXT)
    tracker.finish("finished", timeout_s=PATIENCE_S)
    if record := folder.record().mlflow_run:
        print(f"In MLflow: run {record}, artifact comparison.html (`just ui` shows it)")
    elif uri == OFFLINE:
        what = "tracking.uri=offline" if asked else "the runs were trained with tracking.uri=offline"
        print(f"Not in MLflow: {what}; the same words with another tracking.uri= send the page there")


def store_of_runs(store: str | None) -> str | None:
    """Where the runs are tracked; None, the store of the current folder, where that is a file that is gone."""
    if store and store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        return None
    return store


def letter_word(number: int) -> str:
    """The name of a compared run among MLflow's parameters."""
    from avlit.comparison.subject import letter_of

    return f"run {letter_of(number)}"
