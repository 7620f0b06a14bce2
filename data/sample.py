"""EncodedSample: one clip as it lies in a shard (annotations, latents, features, sound), and its bytes to and fro.

A sample is three tar members: `KEY.json`, `KEY.safetensors`, `KEY.flac`. Nothing else is ever decoded.
"""

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeGuard

import numpy as np

from data.untrusted_json import parse_object

MEMBERS = ("flac", "json", "safetensors")
"""The allow-list: a shard with a member of another extension is refused, not skipped."""

TRACKS = ("speech", "effects", "music")
MAX_REFERENCES = 3
CONTROLS = ("reference_image", "depth", "pose")
"""Pictures that a clip may be generated after, as latents of its video codec; listed in this order everywhere."""

CAPTION = "caption"
"""The style of `Annotation.caption`, which every sample has."""

_RANKS = {"video_latents": 4, "audio_latents": 2, "speech": 3, "effects": 3, "music": 3, "speech_second": 3}
_RANKS |= dict.fromkeys(CONTROLS, 4)
_RANKS |= {f"reference.{number}": 2 for number in range(MAX_REFERENCES)}
_TEXT = re.compile(r"text\.[a-z_]{1,32}")
_FIELDS_OF_CODEC = {"video_codec": ("video_latents",), "audio_codec": ("audio_latents",), "track_encoder": TRACKS}
_DTYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_INFINITY = {2: ("<i2", "<u2", 0x7C00), 4: ("<i4", "<u4", 0x7F800000)}  # its bits, as whole numbers of either kind
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_MOST_NUMBER = 1_000_000  # of frames, pixels and either rate
_LONGEST_S = 3600.0
_MOST_WIDTH = 65_536  # of a row: texts and references are padded to a length of rows, whose width their shape claims


class DamagedSample(Exception):
    """A sample that cannot be used, with the shard, key and reason; the reader counts and replaces it."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}, sample {self.key}: {self.reason}"


@dataclass(frozen=True)
class Annotation:
    """What is known about a clip besides its latents; `KEY.json` holds exactly these fields.

    captions: further texts on the clip, by style (data/captions.py). fps: video frames a second, for sound alone those
    of the video that it would go with. rate_hz: audio samples a second. num_frames, height, width: all 0 for sound
    without picture, which has a duration_s instead. mouth_boxes: per frame, per person (x1, y1, x2, y2) in pixels;
    no list at all where nobody has looked for mouths.
    truth: the embedded corpus's ground truth, empty for real clips. source: where the clip came from, for people (file
    and time, or corpus index).
    """

    caption: str
    transcript: str
    subset: str
    fps: float
    rate_hz: int
    num_frames: int
    height: int
    width: int
    duration_s: float = 0.0
    captions: dict[str, str] = field(default_factory=dict)
    mouth_boxes: list[list[tuple[float, float, float, float]]] = field(default_factory=list)
    truth: dict[str, object] = field(default_factory=dict)
    source: str = ""

    @property
    def shape(self) -> str:
        """The bucket that the clip belongs to: `FxHxW` in frames and pixels, or the length of sound alone, `640ms`."""
        if not self.num_frames:
            return f"{round(1000 * self.duration_s)}ms"
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def seconds(self) -> float:
        """How long the clip lasts."""
        return self.num_frames / self.fps if self.num_frames else self.duration_s


@dataclass(frozen=True)
class EncodedSample:
    """One encoded clip. What the shard set's codecs do not make is None.

    Arrays are float16 or float32: texts: style -> [L, D] without padding, with CAPTION among them;
    video_latents [C, T, h, w]; audio_latents [L, C]; speech, effects, music and, with a second speaker, speech_second
    [F, K, D]; references: up to three of [R, C], latents of other sounds of the speaker.
    reference_image [C, 1, h, w], depth and pose [C, T, h, w]: latents of the video codec; a clip may have none of each.
    waveform: the mixed sound, float32 [N] in [-1, 1] at `annotation.rate_hz`; None where it was not asked for.
    mouth_mask: bool [T, h, w], the latent cells of the annotation's mouth boxes; made by a reader that is asked for it.
    """

    key: str
    annotation: Annotation
    texts: dict[str, np.ndarray]
    video_latents: np.ndarray | None = None
    audio_latents: np.ndarray | None = None
    speech: np.ndarray | None = None
    effects: np.ndarray | None = None
    music: np.ndarray | None = None
    speech_second: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    reference_image: np.ndarray | None = None
    depth: np.ndarray | None = None
    pose: np.ndarray | None = None
    waveform: np.ndarray | None = None
    mouth_mask: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Latents and features by their names in the shard, those that the sample has."""
        named = {name: getattr(self, name) for name in _RANKS if not name.startswith("reference.")}
        named |= {f"text.{style}": text for style, text in self.texts.items()}
        named |= {f"reference.{number}": latents for number, latents in enumerate(self.references)}
        return {name: array for name, array in named.items() if array is not None}

    @classmethod
    def of_arrays(
        cls, key: str, annotation: Annotation, arrays: dict[str, np.ndarray], waveform: np.ndarray | None = None
    ) -> "EncodedSample":
        """The inverse of `arrays`."""
        texts = {name.removeprefix("text."): array for name, array in arrays.items() if name.startswith("text.")}
        references = tuple(arrays[name] for name in sorted(arrays) if name.startswith("reference."))
        rest = {name: array for name, array in arrays.items() if name in _RANKS and not name.startswith("reference.")}
        return cls(key, annotation, texts, references=references, waveform=waveform, **rest)

    def caption_of(self, style: str) -> str:
        """The text of a style."""
        return self.annotation.caption if style == CAPTION else self.annotation.captions[style]


_ANNOTATION_FIELDS = {f.name for f in fields(Annotation)}
_TEXT_FIELDS = ("caption", "transcript", "subset", "source")
_NUMBER_FIELDS = ("fps", "rate_hz")
_SIZE_FIELDS = ("num_frames", "height", "width")


def required_fields(identity: Mapping[str, object]) -> tuple[str, ...]:
    """What every sample of a shard set must have, by the codecs that made it."""
    made = [name for codec, names in _FIELDS_OF_CODEC.items() if codec in identity for name in names]
    return (f"text.{CAPTION}", *made)


def check_key(key: object) -> None:
    """Raises ValueError for a key that may not name a sample: it names tar members, and must not name a path."""
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ValueError(f"sample key {key!r}: 1 to 80 letters, digits, '_' or '-' (it names tar members)")


def check_sample(sample: EncodedSample) -> None:
    """Raises ValueError naming the key and the field for a sample that must not get into a shard."""
    check_key(sample.key)
    if problem := _annotation_problem(vars(sample.annotation)):
        raise ValueError(f"sample {sample.key}: {problem}")
    if len(sample.references) > MAX_REFERENCES:
        raise ValueError(f"sample {sample.key}: {len(sample.references)} references; a sample has at most three")
    if unwritten := sample.texts.keys() - sample.annotation.captions.keys() - {CAPTION}:
        raise ValueError(f"sample {sample.key}: text.{min(unwritten)} is of no caption")
    for name, array in sample.arrays.items():
        if problem := _array_problem(name, array.shape):
            raise ValueError(f"sample {sample.key}: {problem}")
        if not np.isfinite(array).all():
            raise ValueError(f"sample {sample.key}: {name} holds values that are not finite")
    if sample.waveform is None or sample.waveform.ndim != 1 or not np.isfinite(sample.waveform).all():
        raise ValueError(f"sample {sample.key}: waveform must be finite and mono, [N]")


def pack(sample: EncodedSample) -> dict[str, bytes]:
    """A checked sample -> its members' bytes by extension.

    Latents and features are stored as float16: its 11 bits keep a normalised latent to 0.0005 of its value, ten times
    finer than bfloat16 and far below the codecs' own error, at half the reading of float32.
    """
    import soundfile
    from safetensors.numpy import save

    check_sample(sample)
    assert sample.waveform is not None
    halves = {}
    for name, array in sample.arrays.items():
        with np.errstate(over="ignore"):
            halves[name] = np.ascontiguousarray(array, dtype=np.float16)
        if not np.isfinite(halves[name]).all():
            raise ValueError(f"sample {sample.key}: {name} exceeds float16's range of 65504; is it normalised?")
    sound = io.BytesIO()
    soundfile.write(sound, sample.waveform, int(sample.annotation.rate_hz), format="FLAC", subtype="PCM_16")
    annotation = json.dumps(vars(sample.annotation), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {"json": annotation.encode(), "safetensors": save(halves), "flac": sound.getvalue()}


def unpack_annotation(data: bytes | memoryview) -> Annotation:
    """The bytes of `KEY.json` -> Annotation; ValueError says what is missing or wrong."""
    try:
        values = parse_object(data)
    except ValueError as error:
        raise ValueError(f"annotations: {error}") from error
    if problem := _annotation_problem(values):
        raise ValueError(problem)
    return Annotation(**{name: value for name, value in values.items() if name in _ANNOTATION_FIELDS})


def unpack_arrays(data: np.ndarray, *, check_values: bool = True) -> dict[str, np.ndarray]:
    """The bytes of `KEY.safetensors`, uint8 [n], -> arrays that share its memory.

    Parsed here and not by the safetensors package, which copies every tensor; layout checked as strictly. Raises
    ValueError for whatever is wrong; what the header claims is never allocated. check_values: refuse those that are
    not finite; bytes that have been looked at once need it no more.
    """
    if len(data) < 8:
        raise ValueError("safetensors: shorter than its header")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > len(data) - 8:
        raise ValueError("safetensors: the header is longer than the member")
    try:
        header = parse_object(data[8 : 8 + length].data)
    except ValueError as error:
        raise ValueError(f"safetensors: the header: {error}") from error
    payload = data[8 + length :]
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name not in _RANKS and not _TEXT.fullmatch(name):
            raise ValueError(f"field {name[:80]!r} is unknown; a sample has text.STYLE, {', '.join(_RANKS)}")
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if {*map(type, (*shape, begin, end))} != {int} or min(*shape, begin) < 0:
                raise TypeError
            if problem := _array_problem(name, shape):  # first: numpy cannot even hold the lengths of some shapes
                raise ValueError(problem)
            size = math.prod(shape)
            if dtype not in _DTYPES:
                raise ValueError(f"{name} is {dtype!r:.80}; shards hold {' or '.join(_DTYPES)}")
            if not begin <= end <= len(payload) or end - begin != size * _DTYPES[dtype].itemsize:
                raise ValueError(f"safetensors: {name} lies outside the member")
            arrays[name] = np.frombuffer(payload, _DTYPES[dtype], size, begin).reshape(shape)
        except (KeyError, TypeError) as error:
            raise ValueError(f"safetensors: the header's entry for {name} is malformed") from error
    for number, name in enumerate(sorted(name for name in arrays if name.startswith("reference."))):
        if name != f"reference.{number}":
            raise ValueError(f"{name} without reference.{number}: references are numbered from 0 without gaps")
    if check_values:
        _check_values(payload, arrays)
    return arrays


def unpack_waveform(data: bytes | memoryview, annotation: Annotation) -> np.ndarray:
    """The bytes of `KEY.flac` -> float32 [N] in [-1, 1]; ValueError if it is not the mono sound of such a clip.

    annotation: one whose shape and rates have been compared with the shard's; its length bounds what is decoded.
    """
    import soundfile

    longest = 2 * annotation.seconds + 1  # s; a few bytes of FLAC may claim terabytes of silence
    try:
        with soundfile.SoundFile(io.BytesIO(bytes(data))) as sound:
            if sound.channels != 1:
                raise ValueError(f"the sound has {sound.channels} channels; shards hold mono")
            if sound.samplerate != annotation.rate_hz:
                raise ValueError(f"the sound is of {sound.samplerate} Hz, its annotation says {annotation.rate_hz}")
            if sound.frames > longest * sound.samplerate:
                raise ValueError(f"the sound claims {sound.frames} samples, more than {longest:.0f} s")
            return sound.read(dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the sound cannot be decoded: {error}") from error


def _check_values(payload: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    halves = all(array.itemsize == 2 for array in arrays.values()) and len(payload) % 2 == 0
    if halves and _is_finite(payload.view("<f2")):  # the usual case, in one go
        return
    for name, array in arrays.items():
        if not _is_finite(array):
            raise ValueError(f"{name} holds values that are not finite")


def _is_finite(array: np.ndarray) -> bool:
    """As `np.isfinite(array).all()`, which takes many times as long for float16.

    Infinity and NaN are above all finite numbers: read as signed numbers those with a plus, as unsigned all.
    """
    signed, unsigned, infinity = _INFINITY[array.itemsize]
    sign = 1 << (8 * array.itemsize - 1)
    return not array.size or (array.view(signed).max() < infinity and array.view(unsigned).max() < infinity | sign)


def _annotation_problem(values: dict[str, object]) -> str | None:
    for name in _TEXT_FIELDS:
        if not isinstance(values.get(name), str):
            return f"field {name} is missing or not text"
    for name in _NUMBER_FIELDS:
        number = values.get(name)
        if not _is_number(number) or not 0 < number <= _MOST_NUMBER:
            return f"field {name} is missing or not a positive number up to {_MOST_NUMBER}"
    sizes = [values.get(name) for name in _SIZE_FIELDS]
    if not all(map(_is_size, sizes)):
        return f"field {', '.join(_SIZE_FIELDS)} is missing or not a whole number from 0 to {_MOST_NUMBER}"
    duration_s = values.get("duration_s", 0.0)
    if not _is_number(duration_s) or not 0 <= duration_s <= _LONGEST_S:
        return f"field duration_s is not a number from 0 to {_LONGEST_S:.0f}"
    if not (all(sizes) if not duration_s else not any(sizes)):
        return f"{', '.join(_SIZE_FIELDS)} are {sizes} and duration_s {duration_s}: a clip has sizes, or a duration"
    num_frames, fps = values["num_frames"], values["fps"]
    if _is_number(num_frames) and _is_number(fps) and num_frames > _LONGEST_S * fps:
        return f"num_frames {num_frames} at {fps} fps last longer than {_LONGEST_S:.0f} s"
    if not isinstance(values.get("mouth_boxes", []), list) or not isinstance(values.get("truth", {}), dict):
        return "field mouth_boxes is not a list, or truth not an object"
    captions = values.get("captions", {})
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        return "field captions is not an object of texts"
    if not str(values["caption"]).strip():
        return "the caption is empty"
    return None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST_NUMBER


def _array_problem(name: str, shape: tuple[int, ...]) -> str | None:
    rank = _RANKS.get(name, 2)  # of texts
    if len(shape) != rank:
        return f"{name} has shape {list(shape)}; expected {rank} axes"
    if 0 in shape:
        return f"{name} is empty, shape {list(shape)}"
    if shape[-1] > _MOST_WIDTH:
        return f"{name} has shape {list(shape)}; rows have up to {_MOST_WIDTH} values"
    return None
