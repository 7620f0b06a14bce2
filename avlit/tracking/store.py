"""MLflow's sqlite store, made whole or not at all."""

import fcntl
import os
from pathlib import Path

from avlit.durable import sync_folder


def make_store(path: Path) -> None:
    """Make the tables of a new store in the file `path`; one that is there stays as it is. Imports mlflow.

    MLflow makes them step by step in the file itself, without a lock: two processes that do so at once, or one that is
    killed meanwhile, leave a file that no MLflow can use any more. Here one at a time does, in another file.
    """
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_size:
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        part = path.with_name(f"{path.name}.part")
        for leftover in path.parent.glob(f"{part.name}*"):  # with sqlite's journal, of a process that was killed
            leftover.unlink()
        store = SqlAlchemyStore(f"sqlite:///{part}", (path.parent / "mlruns").as_uri())
        store.engine.dispose()
        os.rename(part, path)
        sync_folder(path.parent)
