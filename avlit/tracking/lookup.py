"""Questions to a store: which runs have a tag, and whether one is still known there. Imports mlflow when asked."""

import os
import urllib.error
import urllib.request

from avlit.errors import UserError
from avlit.tracking.sender import SETTINGS
from avlit.tracking.tracker import OFFLINE

MOST = 1000
WAIT_S = 5.0


class StoreError(UserError):
    """The store does not answer."""


def tagged_ids(store: str, key: str, value: str) -> list[str]:
    """avlit's ids of the runs in a store that have a tag, oldest first. StoreError: it does not answer."""
    reach(store)
    for name, setting in SETTINGS.items():
        os.environ.setdefault(name, setting)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    quoted = f"""tags.`{key.replace("`", "")}` = '{value.replace("'", "")}'"""
    try:
        client = MlflowClient(store)
        experiments = [each.experiment_id for each in client.search_experiments()]
        found = client.search_runs(experiments, quoted, order_by=["attributes.start_time ASC"], max_results=MOST)
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise StoreError(f"{store}: does not answer ({type(error).__name__}: {reason})") from error
    return [run.data.tags["avlit_id"] for run in found if "avlit_id" in run.data.tags]


def reach(store: str) -> None:
    """StoreError where a server is away: known at once, while importing mlflow to find out takes seconds."""
    if store == OFFLINE:
        raise StoreError("tracking.uri=offline, is no store")
    if not store.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{store.rstrip('/')}/health", timeout=WAIT_S):
            pass
    except urllib.error.HTTPError:
        return  # something answers; what, mlflow's client will say
    except (urllib.error.URLError, OSError) as error:
        raise StoreError(f"{store}: does not answer ({getattr(error, 'reason', error)})") from error
