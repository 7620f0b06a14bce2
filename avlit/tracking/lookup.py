"""Questions to a store: which runs have a tag, and whether one is still known there. Imports mlflow when asked."""

import os

from avlit.errors import UserError
from avlit.tracking.sender import SETTINGS

MOST = 1000


class StoreError(UserError):
    """The store does not answer."""


def tagged_ids(store: str, key: str, value: str) -> list[str]:
    """avlit's ids of the runs in a store that have a tag, oldest first. StoreError: it does not answer."""
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
