"""Everything that knows MLflow: what a run tells it (tracker), what waits (spool), what sends it (sender, server)."""

from avlit.tracking.sender import replay, replay_all
from avlit.tracking.tracker import (
    OFFLINE,
    GitRevision,
    Tracker,
    git_revision,
    open_parent,
    store_uri,
    track_offline_run,
)

__all__ = [
    "OFFLINE",
    "GitRevision",
    "Tracker",
    "git_revision",
    "open_parent",
    "replay",
    "replay_all",
    "store_uri",
    "track_offline_run",
]
