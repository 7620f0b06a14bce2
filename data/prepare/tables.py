"""A folder of clips as people keep it, with captions beside them or in one table, laid out as `just prepare` reads it.

A table is one JSONL or CSV file in the folder. Its columns name files (video, audio, and what belongs to a clip) and
say what a clip shows (caption, and the fields of a description, see `data/prepare/descriptions.py`).
"""

import csv
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from avlit.errors import UserError
from avlit.settings import nearest
from data.prepare.controls import CONTROL_FILES
from data.prepare.joining import join_streams
from data.prepare.own_reference import REFERENCE_FILE
from data.prepare.sources import content, find_clips
from data.prepare.windows import STEMS

CLIP_COLUMNS = ("video", "audio")
BESIDE = {
    **{name: f"{name}.wav" for name in STEMS},
    "reference_audio": REFERENCE_FILE,
    "reference_image": CONTROL_FILES["reference_image"][1],
    "mask": CONTROL_FILES["reference_image"][0],
    "depth": CONTROL_FILES["depth"][0],
    "pose": CONTROL_FILES["pose"][0],
}
"""Column -> what follows the clip's name in the name of the file that `just prepare` reads."""
FIELDS = (
    "caption", "transcript", "persons", "speaking", "scene", "sound", "subset", "speaker", "captions", "words",
    "num_speakers", "source", "licence",
)  # fmt: skip
"""Columns that describe a clip."""
FILE_COLUMNS = ("file", *CLIP_COLUMNS, *BESIDE)


@dataclass(frozen=True)
class ClipRow:
    """One clip: its media file, the sound that replaces its own, what lies beside it, and its description."""

    name: str
    media: Path
    sound: Path | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)
    record: Mapping[str, object] = field(default_factory=dict)

    @property
    def files(self) -> Iterator[tuple[str, Path]]:
        """(what it is, file) of all."""
        yield "media", self.media
        if self.sound is not None:
            yield "sound", self.sound
        yield from sorted(self.beside.items())


def find_table(folder: Path) -> Path | None:
    """The one table of a folder, None where there is none. UserError: there are several."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jsonl", ".csv") and path.is_file())
    if len(tables) > 1:
        raise UserError(
            f"data.root={folder}: {', '.join(path.name for path in tables)}: keep one of these tables there"
        )
    return tables[0] if tables else None


def read_rows(folder: Path, *, suffixes: tuple[str, ...]) -> list[ClipRow]:
    """Every clip of a folder, in the order of their names: those of its table, and those with a caption beside them.

    suffixes: of media files (`data.prepare.sources`), besides those that the table names.
    UserError names the table's line and column where something is wrong with it, and a clip without any caption.
    """
    clips = find_clips(folder, suffixes=suffixes)
    table = find_table(folder)
    rows = [] if table is None else [_row(line, table, folder) for line in _lines(table)]
    used = {path.resolve() for row in rows for _, path in row.files}
    for clip in clips:
        if clip.resolve() in used:
            continue
        if not any(clip.with_suffix(suffix).is_file() for suffix in (".txt", ".json")):
            listed = f", and no line of {table.name} is about it" if table else ""
            raise UserError(
                f"data.root={folder}: {clip.relative_to(folder)} has no {clip.stem}.txt or {clip.stem}.json beside "
                f"it{listed}; write one, or take the clip away"
            )
        rows.append(ClipRow(clip.relative_to(folder).with_suffix("").as_posix(), clip, beside=_there(clip)))
    if not rows:
        raise UserError(
            f"data.root={folder}: holds no clips; put some there, each with its caption in NAME.txt beside it"
        )
    names: dict[str, ClipRow] = {}
    for row in rows:
        if (first := names.setdefault(row.name, row)) is not row:
            raise UserError(f"data.root={folder}: {first.media} and {row.media} are both named {row.name}; rename one")
    return [names[name] for name in sorted(names)]


def digest_of(rows: list[ClipRow]) -> str:
    """The same for the same clips, captions and files beside them only, wherever they lie."""
    digest = xxhash.xxh3_128()
    for row in rows:
        texts = [row.media.with_suffix(suffix) for suffix in (".txt", ".json") if not row.record]
        parts = [f"{what} {content(path)}" for what, path in (*row.files, *(("text", t) for t in texts if t.is_file()))]
        digest.update(json.dumps([row.name, row.media.suffix, parts, row.record], sort_keys=True).encode())
    return digest.hexdigest()


def lay_out(rows: list[ClipRow], folder: Path) -> None:
    """Fill a new folder with links to the clips and their parts, and a description beside each.

    Where a row gives a clip another sound, the two are joined in a new file, the picture as it is.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        stem = folder / row.name
        stem.parent.mkdir(parents=True, exist_ok=True)
        if row.sound is None:
            stem.with_name(stem.name + row.media.suffix).symlink_to(row.media.resolve())
        else:
            join_streams(row.media, row.sound, stem.with_name(f"{stem.name}.mkv"))
        for ending, path in row.beside.items():
            stem.with_name(f"{stem.name}.{ending}").symlink_to(path.resolve())
        if row.record:
            stem.with_name(f"{stem.name}.json").write_text(json.dumps(row.record), encoding="utf-8")
            continue
        for suffix in (".txt", ".json"):
            if (text := row.media.with_suffix(suffix)).is_file():
                stem.with_name(stem.name + suffix).symlink_to(text.resolve())


def _there(clip: Path) -> dict[str, Path]:
    """What lies beside a clip already, under the names that `just prepare` reads."""
    return {end: path for end in BESIDE.values() if (path := clip.with_name(f"{clip.stem}.{end}")).is_file()}


def _lines(table: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(place, columns with a value) of every line of a JSONL or CSV file."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: cannot be read as text: {error}") from error
    if table.suffix.lower() == ".csv":
        for number, values in enumerate(csv.DictReader(text.splitlines()), start=2):
            place = f"{table}, line {number}"
            if None in values or None in values.values():
                raise UserError(f"{place}: has more or fewer values than the first line has columns")
            yield place, {column.strip(): value for column, value in values.items() if value.strip()}
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{table}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{place}: must be a JSON object {{column: value}}")
        yield place, values  # what is null there says so: nobody speaks, for example


def _row(line: tuple[str, dict[str, object]], table: Path, folder: Path) -> ClipRow:
    place, values = line
    for column in values:
        if column not in (*FILE_COLUMNS, *FIELDS):
            near = nearest(column, (*FILE_COLUMNS, *FIELDS))
            hint = f"did you mean {near}?" if near else f"there are {', '.join((*FILE_COLUMNS, *FIELDS))}"
            raise UserError(f"{place}: no such column as {column}; {hint}")
    files = {
        column: _file(values[column], column, place, table, folder) for column in FILE_COLUMNS if values.get(column)
    }
    video = files.pop("video", None) or files.pop("file", None)
    sound = files.pop("audio", None)
    media = video or sound
    if media is None or "file" in files:
        raise UserError(f"{place}: needs one of video and audio, the name of a file; it has {', '.join(values)}")
    inside = media.is_relative_to(folder.resolve())
    name = media.relative_to(folder.resolve()).with_suffix("").as_posix() if inside else media.stem
    beside = _there(media) | {BESIDE[column]: path for column, path in files.items()}
    record = {column: value for column, value in values.items() if column in FIELDS}
    if not record:
        raise UserError(f"{place}: says nothing of {media.name}; give it a caption")
    return ClipRow(name, media, None if media is sound else sound, beside, record)


def _file(value: object, column: str, place: str, table: Path, folder: Path) -> Path:
    """A file that a column names: beside the table, from one folder above, or anywhere by its whole path."""
    if not isinstance(value, str):
        raise UserError(f"{place}: {column}={value!r} must be the name of a file")
    candidates = [base / value for base in (table.parent, folder, folder.parent)]
    found = next((path.resolve() for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(f"{place}: {column}={value}: no such file beside the table or one folder above")
    return found
