"""Where a clip's record is: in a JSONL file, in `NAME.json` or `NAME.txt` beside it, or in its name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from avlit.errors import ConfigError
from data.prepare.descriptions import Description, Rejected, describe
from data.prepare.names import NamePattern


class Descriptions:
    """Captions of clips: those of the JSONL file first, then `NAME.json`, then `NAME.txt` beside the clip.

    `NAME.txt` holds the caption, or beside sound alone what is said. pattern: reads speaker and transcript from names
    where the record does not say them. problems: (place, reason) of every record that belongs to no clip.
    """

    def __init__(
        self,
        clips: Sequence[Path],
        *,
        source: Path,
        jsonl: Path | None,
        default_subset: str,
        pattern: NamePattern | None = None,
        has_picture: bool = True,
    ) -> None:
        self._default_subset, self._pattern, self._has_picture = default_subset, pattern, has_picture
        self._records: dict[Path, tuple[str, object]] = {}
        self.problems: list[tuple[str, str]] = []
        self._jsonl = jsonl
        if jsonl is not None:
            self._read(jsonl, source, {clip.resolve() for clip in clips})

    def of(self, clip: Path) -> Description:
        """The description of a clip; Rejected says what is missing or wrong."""
        try:
            named = {} if self._pattern is None else self._pattern.read(clip.stem)
        except ValueError as error:
            raise Rejected(str(error)) from error
        if found := self._records.get(clip.resolve()):
            place, record = found
        elif (beside := clip.with_suffix(".json")).is_file():
            place, record = beside.name, _parse(_text(beside), beside.name)
        elif (beside := clip.with_suffix(".txt")).is_file():
            place, record = beside.name, {"caption" if self._has_picture else "transcript": _text(beside)}
        elif "transcript" in named and not self._has_picture:
            place, record = "its name", {}
        else:
            listed = f"no record in {self._jsonl.name} and " if self._jsonl else ""
            hint = "" if self._has_picture else "; where file names say what is spoken, give pattern=…"
            raise Rejected(f"no caption: {listed}no {clip.stem}.json or {clip.stem}.txt beside it{hint}")
        try:
            if isinstance(record, Mapping):
                record = {**named, **record}
            return describe(record, default_subset=self._default_subset, has_picture=self._has_picture)
        except ValueError as error:
            raise Rejected(f"caption in {place}: {error}") from error

    def has(self, clip: Path) -> bool:
        """Whether a clip has a description that can be used."""
        try:
            self.of(clip)
        except Rejected:
            return False
        return True

    def _read(self, jsonl: Path, source: Path, clips: set[Path]) -> None:
        try:
            lines = jsonl.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"captions={jsonl}: cannot be read as text: {error}") from error
        for number, line in enumerate(lines, start=1):
            place = f"{jsonl.name}, line {number}"
            if not line.strip():
                continue
            try:
                record = _parse(line, place)
                clip = _place(record, (jsonl.parent, jsonl.parent.parent, source), clips)
                if clip in self._records:
                    raise Rejected(f"a second record of {clip.name}; {self._records[clip][0]} is used")
            except Rejected as rejected:
                self.problems.append((place, str(rejected)))
            else:
                self._records[clip] = place, record


def _place(record: object, folders: Sequence[Path], clips: set[Path]) -> Path:
    """The clip that a record is about: its `file` under one of the folders."""
    name = record.get("file") if isinstance(record, Mapping) else None
    if not isinstance(name, str) or not name:
        raise Rejected("the record has no `file`")
    candidates = [(folder / name).resolve() for folder in folders]
    if found := next((path for path in candidates if path in clips), None):
        return found
    if existing := next((path for path in candidates if path.is_file()), None):
        raise Rejected(f"{existing} is not a media file under source")
    raise Rejected(f"file={name}: not found beside the captions, one folder above, or under source")


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{place} is not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Rejected(f"{path.name} cannot be read as text: {error}") from error
