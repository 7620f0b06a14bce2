"""The media files that a preparation starts from: found by suffix, chosen by name, told apart by content."""

from fnmatch import fnmatchcase
from pathlib import Path

import xxhash

from avlit.errors import UserError
from data.prepare.controls import CONTROL_FILES
from data.prepare.descriptions import Rejected
from data.prepare.own_reference import REFERENCE_FILE
from data.prepare.windows import STEMS

CLIP_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
SOUND_SUFFIXES = (".aac", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", *CLIP_SUFFIXES)
"""What counts as a media file, with picture and without."""

_BESIDE = tuple(
    f".{suffix}" for suffix in (*(f"{name}.wav" for name in STEMS), REFERENCE_FILE, *sum(CONTROL_FILES.values(), ()))
)


def find_clips(source: Path, *, suffixes: tuple[str, ...] = CLIP_SUFFIXES) -> list[Path]:
    """Media files in `source` and its subfolders by suffix, in order; hidden ones and parts of others are passed over.

    A part is a stem `NAME.TRACK.wav`, a control or a reference voice beside another media file `NAME`.
    """
    found = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    names = {path.with_suffix("") for path in found}
    return [path for path in found if not path.name.endswith(_BESIDE) or _owner(path) not in names]


def choose_clips(source: Path, *, suffixes: tuple[str, ...], include: str) -> tuple[list[Path], list[Path]]:
    """All media files in `source`, and those of them that `include`, a glob, names; UserError where there are none."""
    there = find_clips(source, suffixes=suffixes)
    if not there:
        raise UserError(f"source={source}: no media files there ({', '.join(suffixes)})")
    clips = [clip for clip in there if fnmatchcase(clip.stem, include)]
    if not clips:
        raise UserError(
            f"include={include}: names none of the {len(there)} media files; it is a glob on names without "
            f"their suffix, such as {there[0].stem}"
        )
    return there, clips


def content(path: Path) -> str:
    """The same for files of the same bytes only; raises Rejected where the file cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as data:
            while block := data.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _owner(path: Path) -> Path:
    """`NAME` of `NAME.TRACK.wav` or `NAME.depth.mp4`."""
    return path.with_suffix("").with_suffix("")
