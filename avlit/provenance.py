"""What a run is made from: config, code, library versions and data; a resume compares it and names what differs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from avlit.durable import write_atomically
from avlit.errors import UserError
from avlit.settings import as_word, flatten, read_yaml

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "lightning", "diffusers", "safetensors", "numpy", "peft")
FREE_KEYS = (
    # where things are: contents are compared by fingerprint
    "runs_dir", "data.root", "data.cache_dir", "codecs.*_weights", "model.weights",
    # how they are read, and what is written about them: neither batches nor updates depend on it
    "data.workers", "data.prefetch", "data.max_bad", "data.max_restarts", "data.timeout_s", "train.log_every",
    "checkpoint.keep", "checkpoint.keep_every", "checkpoint.best", "sample.*", "validation.every", "tracking.*",
    # whether training ends, not what it computes as long as it goes on
    "train.on_nonfinite", "train.max_roll_backs",
)  # fmt: skip
"""Config keys that a resume may change without being asked: each step computes bit for bit the same."""
ROLL_BACK_KEYS = ("train.max_nonfinite", "checkpoint.every")
"""Keys that decide at which steps a run is rolled back, and to which; as free where it was not, or will not be."""
AFTERWARDS = {"tables", "comparison", "evaluation", "export"}
"""Folders whose sources say which runs are made and what is done with trained ones, not what one of them computes."""
MAX_LISTED = 8


class ChangedError(UserError):
    """A run would be resumed with another config, code, library or data than it was trained with."""


@dataclass(frozen=True)
class Provenance:
    """All that decides what a run computes.

    config: resolved, as YAML. revision: the git commit, "" without one. code: source file -> digest.
    versions: library -> version. data: the shard set's identity and `fingerprint`, the hash of its contents.
    """

    config: str
    revision: str = ""
    code: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, config: str, *, recipe_folder: Path, revision: str, data: Mapping[str, object]) -> "Provenance":
        """Of this process: the sources of the core and of one recipe, and the libraries that compute."""
        return cls(
            config=config,
            revision=revision,
            code=source_digests(recipe_folder),
            versions={name: version(name) for name in LIBRARIES},
            data={key: str(value) for key, value in data.items()},
        )

    def write(self, path: Path) -> None:
        """Store as JSON, atomically."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path, *, is_damage_allowed: bool = False) -> "Provenance | None":
        """What `write` stored; None where a run was killed before that. ChangedError: the file is damaged.

        is_damage_allowed: a damaged file is as good as none.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{item.name: values[item.name] for item in fields(cls)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if is_damage_allowed:
                return None
            raise ChangedError(
                f"{path}: cannot be read ({error}), so nobody knows what the run was trained with; "
                "allow_change=true resumes all the same"
            ) from error


def source_digests(recipe_folder: Path) -> dict[str, str]:
    """Sources that a run of the recipe may execute or read -> 16 hex digits of their contents."""
    folders = [ROOT / "avlit", ROOT / "data", ROOT / "callbacks", recipe_folder]
    found = [path for folder in folders for kind in ("*.py", "*.yaml") for path in folder.rglob(kind)]
    paths = [path for path in found if not AFTERWARDS & set(path.parts)]
    return {
        path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name: hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:16]
        for path in sorted(paths)
    }


def differences(before: Provenance, now: Provenance) -> list[str]:
    """One line for each thing that would change what the run computes; empty where it goes on as it was."""
    was, is_now = flatten(read_yaml(before.config, "the run")), flatten(read_yaml(now.config, "now"))
    is_rolled_back = all(flat.get("train.on_nonfinite") == "roll_back" for flat in (was, is_now))
    free = FREE_KEYS if is_rolled_back else (*FREE_KEYS, *ROLL_BACK_KEYS)
    lines = [
        f"config: {key} was {as_word(old)}, is {as_word(new)}"
        for key, old, new in _changed(was, is_now)
        if not any(fnmatch(key, pattern) for pattern in free)
    ]
    files = [
        f"{name} ({'removed' if new is None else 'added' if old is None else 'changed'})"
        for name, old, new in _changed(before.code, now.code)
    ]
    if files:
        more = f" and {len(files) - MAX_LISTED} more" if len(files) > MAX_LISTED else ""
        revisions = f" (commit {before.revision[:10] or 'unknown'}, now {now.revision[:10] or 'unknown'})"
        lines.append(f"code{revisions}: {', '.join(files[:MAX_LISTED])}{more}")
    lines += [f"library: {name} was {old}, is {new}" for name, old, new in _changed(before.versions, now.versions)]
    lines += [f"data: {key} was {old}, is {new}" for key, old, new in _changed(before.data, now.data)]
    return lines


def check_unchanged(before: Provenance, now: Provenance, *, run: str, is_allowed: bool) -> list[str]:
    """The differences, if `is_allowed`; ChangedError listing them otherwise."""
    lines = differences(before, now)
    if lines and not is_allowed:
        listed = "\n".join(f"  {line}" for line in lines)
        raise ChangedError(
            f"run={run}: it would not go on as it began:\n{listed}\n"
            f"Put these back, or say allow_change=true to resume with the change; "
            f"`just train init={run} …` starts a new run from its weights instead"
        )
    return lines


def _changed(before: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, object, object]]:
    names = dict.fromkeys([*before, *now])
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]
