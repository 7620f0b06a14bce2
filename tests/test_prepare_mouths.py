"""Mouth boxes of real clips: who is followed where, what a window and a report hold, and the face mesh's geometry."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avlit.__main__ import main
from avlit.codecs.build import build_text_encoder, build_video_codec
from avlit.errors import ConfigError
from avlit.media import MediaError, read_clip, write_mp4
from avlit.timing import Timing
from data.encode import Encoders
from data.prepare import face_mesh, mouths
from data.prepare.config import load_prepare_config
from data.prepare.face_mesh import LIPS, Face, FaceMesh, FaceSquare, is_installed
from data.prepare.mouths import UNSEEN, Box, MouthFinder, build_mouth_finder
from data.prepare.preparation import Preparation, prepare
from data.prepare.report import REPORT, FileReport, Report
from data.prepare.windows import ClipWindows, Window
from data.shards import ShardSet

SHARED = Path(__file__).parents[2] / "shared" / "media" / "clips"
FPS = 12
COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
"""A person of the tests is a square of one of these, with the mouth in the lower half of it."""

needs_mesh = pytest.mark.skipif(not is_installed(), reason="the face mesh, which is optional, is not there")
needs_media = pytest.mark.skipif(not SHARED.is_dir(), reason="shared media are not there")


@dataclass
class SquareFaces:
    """Finds the tests' persons by their colour. searches: how often the whole picture was looked at."""

    searches: int = 0

    def detect(self, picture: Image.Image) -> list[FaceSquare]:
        self.searches += 1
        return [face.square for face in reversed(_faces(picture)) for _ in range(2)]  # each twice, the last first

    def look(self, picture: Image.Image, square: FaceSquare) -> Face | None:
        near = [face for face in _faces(picture) if abs(face.square.x - square.x) < square.face_size / 2]
        return near[0] if near else None


def _faces(picture: Image.Image) -> list[Face]:
    pixels = np.asarray(picture).astype(int)
    faces = []
    for colour in COLOURS:
        y, x = np.nonzero((abs(pixels - colour) < 60).all(-1))
        if len(x) > 8:
            faces.append(face_of(x.min(), y.min(), x.max() + 1, y.max() + 1))
    return faces


def face_of(x1: float, y1: float, x2: float, y2: float) -> Face:
    """A face as large as a box: lips in the middle half of its width and its last quarter."""
    points = np.tile([(x1 + x2) / 2, (y1 + y2) / 2], (468, 1))
    points[10], points[152] = (x1, y1), (x2, y2)
    points[33], points[263] = (x1, y1), (x2, y1)
    points[list(LIPS)] = ((x1 + x2) / 2, y2)
    points[LIPS[0]], points[LIPS[1]] = (x1 + (x2 - x1) / 4, y2 - (y2 - y1) / 4), (x2 - (x2 - x1) / 4, y2)
    return Face(points)


def lips_of(left: float, *, size: int = 16, top: int = 8) -> Box:
    return left + size / 4, top + size * 3 / 4, left + size * 3 / 4, top + float(size)


def scene(*tracks: Sequence[int | None], width: int = 96) -> np.ndarray:
    """Frames [F, 48, W, 3] of persons of 16 pixels; a track is where each frame has a person's left edge, or None."""
    frames = np.full((len(tracks[0]), 48, width, 3), 128, np.uint8)
    for colour, track in zip(COLOURS, tracks, strict=False):
        for frame, left in zip(frames, track, strict=True):
            if left is not None:
                frame[8:24, max(left, 0) : left + 16] = colour
    return frames


def found(*tracks: Sequence[int | None]) -> list[list[Box]]:
    return MouthFinder(SquareFaces()).find(scene(*tracks), fps=FPS)


# --- who is followed where ---


def test_persons_keep_their_places_while_they_move_and_are_counted_from_left_to_right():
    right, left = list(range(70, 58, -1)), list(range(12))
    assert found(right, left) == [[lips_of(b), lips_of(a)] for a, b in zip(right, left, strict=True)]


def test_a_person_who_is_not_seen_for_a_while_leaves_a_gap_and_comes_back_to_the_same_place():
    boxes = found([4, 5, 6, None, None, 8, 9, 9, 9], [60] * 9)
    first, second = lips_of(60), UNSEEN
    assert boxes[:3] == [[lips_of(x), first] for x in (4, 5, 6)]
    assert boxes[3:5] == [[second, first]] * 2
    assert boxes[6:] == [[lips_of(9), first]] * 3
    assert found([60] * 9, [None] * 9) == [[lips_of(60)]] * 9


def test_last_person_who_is_gone_leaves_no_entry():
    assert found([4] * 9, [60] * 5 + [None] * 4)[4:] == [[lips_of(4), lips_of(60)]] + [[lips_of(4)]] * 4


def test_new_person_is_found_within_a_quarter_of_a_second():
    boxes = found([4] * 24, [None] * 10 + [60] * 14)
    assert boxes[9] == [lips_of(4)]
    assert boxes[13] == [lips_of(4), lips_of(60)]


def test_a_face_elsewhere_is_another_person():
    boxes = found([4] * 6 + [70] * 6)
    assert boxes[0] == [lips_of(4)] and boxes[-1] == [UNSEEN, lips_of(70)]


def test_what_flashes_up_is_no_person():
    assert found([4] * 12, [None] * 6 + [60] * 2 + [None] * 4) == [[lips_of(4)]] * 12


def test_without_faces_every_frame_is_empty():
    assert found([None] * 7) == [[]] * 7


def test_boxes_are_cut_to_the_picture():
    (box,) = found([-6] * 4)[0]
    x1, _, x2, _ = box
    assert x1 >= 0 and x2 > x1
    frames = scene([4] * 4)[:, :20]  # its mouth is below the picture's edge
    assert all(y2 <= 20 for boxes in MouthFinder(SquareFaces()).find(frames, fps=FPS) for *_, y2 in boxes)


def test_the_whole_picture_is_searched_four_times_a_second_and_when_someone_is_lost():
    faces = SquareFaces()
    MouthFinder(faces).find(scene([4] * 24), fps=FPS)
    assert faces.searches == 8
    faces = SquareFaces()
    MouthFinder(faces).find(scene([4] * 10 + [None] * 14), fps=FPS)
    assert faces.searches == 9


# --- windows of files ---

TINY = Timing(fps=FPS, num_frames=5, height=16, width=16, rate_hz=16000)


def write_clip(path: Path, *tracks: Sequence[int | None]) -> Path:
    frames = scene(*tracks)
    sound = 0.1 * np.random.default_rng(0).standard_normal(round(len(frames) / FPS * 16000)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames, fps=FPS, waveform=sound, rate_hz=16000, scale=1)
    path.with_suffix(".txt").write_text("A square.")
    return path


def windows_of(path: Path, finder: MouthFinder | None) -> list[Window]:
    cut = ClipWindows(path, timing=TINY, stride_frames=3, separator=None, mouths=finder)
    return [window for window in cut.read() if isinstance(window, Window)]


def test_boxes_of_a_window_lie_on_its_own_frames_cut_and_scaled_as_they_are(tmp_path: Path):
    moving = list(range(26, 38))
    first, second, *_ = windows_of(write_clip(tmp_path / "a.mp4", moving), MouthFinder(SquareFaces()))
    for start, window in ((0, first), (3, second)):
        assert window.frames is not None and len(window.mouth_boxes) == len(window.frames) == 5
        for number, boxes in enumerate(window.mouth_boxes):
            left = (moving[start + number] - 24) / 3  # the middle 48 of 96 pixels, a third as large
            assert boxes == [pytest.approx(lips_of(left, size=16 / 3, top=8 / 3), abs=0.4)]  # type: ignore[arg-type]


def test_faces_are_found_though_the_window_cuts_them_and_only_what_it_keeps_is_a_mouth(tmp_path: Path):
    path = write_clip(tmp_path / "a.mp4", [2] * 6, [16] * 6, [60] * 6)  # the window shows 24 to 72
    window, *_ = windows_of(path, MouthFinder(SquareFaces()))
    (x1, _, x2, _), right = window.mouth_boxes[0]
    assert (x1, x2) == (0, pytest.approx(4 / 3, abs=0.4))
    assert right == pytest.approx(lips_of(12, size=16 / 3, top=8 / 3), abs=0.4)  # type: ignore[arg-type]
    assert all(len(boxes) == 2 for boxes in window.mouth_boxes)


def test_large_pictures_are_searched_smaller_and_boxes_are_of_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mouths, "SHORT_SIDE", 32)
    window, *_ = windows_of(write_clip(tmp_path / "a.mp4", [39] * 5), MouthFinder(SquareFaces()))
    assert window.mouth_boxes[0] == [pytest.approx(lips_of(5, size=16 / 3, top=8 / 3), abs=0.5)]  # type: ignore[arg-type]


def test_without_a_finder_a_window_says_that_nobody_looked(tmp_path: Path):
    window, *_ = windows_of(write_clip(tmp_path / "a.mp4", [30] * 5), None)
    assert window.mouth_boxes == []
    faceless, *_ = windows_of(tmp_path / "a.mp4", MouthFinder(NoFaces()))
    assert faceless.mouth_boxes == [[]] * 5


class NoFaces(SquareFaces):
    def detect(self, picture: Image.Image) -> list[FaceSquare]:
        return []


def test_what_was_found_is_kept_by_content_window_and_finder_and_read_again(tmp_path: Path):
    cache, path = tmp_path / "cache", write_clip(tmp_path / "a.mp4", list(range(26, 38)))
    first = [window.mouth_boxes for window in windows_of(path, MouthFinder(SquareFaces(), cache=cache))]
    kept = sorted(cache.iterdir())
    assert len(kept) == len(first) > 1
    moved = path.rename(tmp_path / "b.mp4")
    again = windows_of(moved, MouthFinder(NoFaces(), cache=cache))  # would find nothing
    assert [window.mouth_boxes for window in again] == first
    for damage in ("", "[", "[[]]", '[["mouth"], [], [], [], []]'):
        kept[0].write_text(damage)
        windows_of(moved, MouthFinder(SquareFaces(), cache=cache))
        assert len(json.loads(kept[0].read_text())) == 5  # found anew
    assert windows_of(moved, MouthFinder(NoFaces(), name="another", cache=cache))[0].mouth_boxes == [[]] * 5
    assert len(list(cache.iterdir())) == 2 * len(first)


def test_window_whose_mouths_cannot_be_looked_for_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_clip(tmp_path / "clips" / "a.mp4", [30] * 12)
    calls = iter([None, None, MediaError(f"{path}: is damaged"), None, None])  # two for each window

    def read(*args, **given):
        if error := next(calls):
            raise error
        return read_clip(*args, **given)

    monkeypatch.setattr(mouths, "read_clip", read)
    report = prepared(tmp_path / "clips", tmp_path / "shards", MouthFinder(SquareFaces()))
    assert report.files[0].left_out == {"is damaged": 1} and report.num_kept == 2


# --- shards and report ---


def prepared(source: Path, out: Path, finder: MouthFinder | None, **settings: object) -> Report:
    return prepare(
        source,
        out,
        captions=None,
        how=Preparation(
            timing=TINY, stride_frames=3, heldout=0, default_subset="single_character", shard_samples=8
        ),
        encoders=Encoders(text=build_text_encoder("embedded"), video=build_video_codec("embedded")),
        separator=None,
        mouths=finder,
        settings=settings,
        progress=False,
    )  # fmt: skip


def test_boxes_lie_in_the_shards_and_the_report_counts_frames_with_a_mouth(tmp_path: Path):
    write_clip(tmp_path / "clips" / "a.mp4", [30] * 5 + [None] * 7)
    report = prepared(tmp_path / "clips", tmp_path / "shards", MouthFinder(SquareFaces(), name="the squares"))
    shards = ShardSet.open(tmp_path / "shards")
    boxes = [shards.read(0, index).annotation.mouth_boxes for index in range(3)]
    assert [[len(persons) for persons in window] for window in boxes] == [[1] * 5, [0] * 5, [0] * 5]
    assert "Frames with a mouth: 5 of 15 (33%), found by the squares" in report.lines()
    document = json.loads((tmp_path / "shards" / REPORT).read_text("utf-8"))
    assert document["mouth_finder"] == "the squares"
    assert (document["files"][0]["frames_with_mouth"], document["files"][0]["frames"]) == (5, 15)


def test_report_says_what_to_install_where_mouths_could_not_be_looked_for():
    def told(**settings: object) -> str:
        file = FileReport("a.mp4", ("basic_face",), kept={"train": 1}, frames=5)
        return "\n".join(Report(settings, [file]).lines())

    assert "uv pip install ai-edge-litert` and `uv pip install --no-deps mediapipe==0.10.21`" in told(mouths="auto")
    assert "outh" not in told(mouths="none")


def test_finder_is_the_face_mesh_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mouths, "is_installed", lambda: False)
    assert build_mouth_finder("auto") is None and build_mouth_finder("none") is None
    with pytest.raises(ConfigError, match=r"mouths=facemesh: not installed; .*ai-edge-litert.*or give mouths=none"):
        build_mouth_finder("facemesh")
    monkeypatch.setattr(mouths, "is_installed", lambda: True)
    monkeypatch.setattr(mouths, "FaceMesh", SquareFaces)
    for name in ("auto", "facemesh"):
        finder = build_mouth_finder(name)
        assert finder is not None and isinstance(finder.faces, SquareFaces)
    assert build_mouth_finder("none") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mouths=dlib"], "mouths=dlib .*one of auto, none, facemesh"),
        (
            ["recipe=unitalking_stage1", "mouths=none"],
            "mouths=none: has no effect while codecs.video=none",
        ),
    ],
)
def test_a_wrong_word_on_mouths_is_refused(tmp_path: Path, words: list[str], message: str):
    (tmp_path / "clips").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_prepare_config([f"source={tmp_path / 'clips'}", f"out={tmp_path / 'out'}", *words])


def test_command_looks_for_mouths_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(mouths, "is_installed", lambda: True)
    monkeypatch.setattr(mouths, "FaceMesh", SquareFaces)
    write_clip(tmp_path / "clips" / "a.mp4", [30] * 12)
    small = ["data.num_frames=5", "data.height=16", "data.width=16", "separator=simple", "heldout=0"]
    words = ["prepare", f"source={tmp_path / 'clips'}", *small]
    assert main([*words, f"out={tmp_path / 'found'}"]) == 0
    assert "Frames with a mouth: 10 of 10 (100%)" in capsys.readouterr().out
    assert main([*words, f"out={tmp_path / 'none'}", "mouths=none"]) == 0
    assert "mouth:" not in capsys.readouterr().out


# --- the face mesh's geometry, with networks that see a white spot ---

FAKE_RUNTIME = '''
import numpy as np

class Interpreter:
    """Sees a white spot: the detector a face of 40 pixels around it, the mesh all points on it, the lips beside it."""

    def __init__(self, *, model_path, num_threads):
        self.is_mesh = "face_landmark" in model_path

    def allocate_tensors(self):
        pass

    def get_input_details(self):
        return [{"index": 0, "shape": [1, 192, 192, 3]}]

    def get_output_details(self):
        return [{"index": 1}, {"index": 2}]

    def set_tensor(self, index, picture):
        assert picture.shape == (1, 192, 192, 3) and picture.dtype == np.float32
        assert picture.max() <= 1 and picture.min() >= (0 if self.is_mesh else -1)
        bright = (picture[0].mean(-1) - picture.min()).clip(0)
        y, x = np.mgrid[:192, :192] + 0.5
        self.spot = (
            np.array([(bright * x).sum(), (bright * y).sum()]) / bright.sum() if bright.max() > 0.3 else None
        )

    def invoke(self):
        if self.is_mesh:
            points = np.zeros((468, 3))
            if self.spot is not None:
                points[:, :2] = self.spot
                points[61, :2] += (-6, -3)
                points[291, :2] += (6, 3)
            self.out = {1: points.reshape(1, 1, -1), 2: np.full((1, 1, 1), -3.0 if self.spot is None else 3.0)}
            return
        raw, logits = np.zeros((2304, 16)), np.full((2304, 1), -100.0)
        if self.spot is not None:
            column, row = (self.spot // 4).astype(int)
            offset = self.spot - (np.array([column, row]) + 0.5) * 4
            raw[row * 48 + column] = [*offset, 40, 40, *(offset + (-8, -4)), *(offset + (8, -4)), *[0] * 8]
            logits[row * 48 + column] = 3
        self.out = {1: raw, 2: logits}

    def get_tensor(self, index):
        return self.out[index].astype(np.float32)[None]
'''


@pytest.fixture
def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaceMesh:
    """A face mesh of networks that see a white spot, laid out as its packages are."""
    runtime = tmp_path / "fake_runtime"
    runtime.mkdir()
    (runtime / "__init__.py").touch()
    (runtime / "interpreter.py").write_text(FAKE_RUNTIME)
    for file in (face_mesh.DETECTOR, face_mesh.MESH):
        (tmp_path / "fake_weights" / "modules" / file).parent.mkdir(parents=True)
        (tmp_path / "fake_weights" / "modules" / file).touch()
    (tmp_path / "fake_weights" / "__init__.py").write_text("raise ImportError('needs an older numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(face_mesh, "RUNTIME", "fake_runtime")
    monkeypatch.setattr(face_mesh, "WEIGHTS", "fake_weights")
    assert is_installed()
    return FaceMesh()


def spotted(x: float, y: float, *, width: int = 640, height: int = 360, radius: float = 6) -> Image.Image:
    rows, columns = np.mgrid[:height, :width] + 0.5
    is_spot = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return Image.fromarray(np.repeat((is_spot * 255).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize(("x", "y"), [(100, 60), (320, 180), (622, 345), (14, 340), (250, 20)])
@pytest.mark.parametrize(("width", "height"), [(640, 360), (360, 640), (640, 640)])
def test_detected_faces_lie_where_they_are_in_a_picture_of_any_shape(
    mesh: FaceMesh, x: float, y: float, width: int, height: int
):
    x, y = x * width / 640, y * height / 360
    squares = mesh.detect(spotted(x, y, width=width, height=height))
    near = [square for square in squares if math.hypot(square.x - x, square.y - y) < 3]
    assert near and len(near) == len(squares), "nothing elsewhere"
    short = min(width, height)
    assert any(square.face_size == pytest.approx(40 / 192 * short) and square.angle == 0 for square in near)


def test_nothing_is_detected_in_an_empty_picture(mesh: FaceMesh):
    assert mesh.detect(Image.new("RGB", (640, 360))) == []


@pytest.mark.parametrize("angle", [0.0, 0.6, -1.2, math.pi])
@pytest.mark.parametrize("side", [96, 192, 300])
def test_mesh_of_a_tilted_square_is_where_the_face_is(mesh: FaceMesh, angle: float, side: float):
    face = mesh.look(spotted(200, 150), FaceSquare(215.0, 140.0, float(side), angle))
    assert face is not None
    assert face.points[0] == pytest.approx([200, 150], abs=1)
    step = side / 192
    lips = [(step * (math.cos(angle) * u - math.sin(angle) * v), step * (math.sin(angle) * u + math.cos(angle) * v))
            for u, v in ((-6, -3), (6, 3))]  # fmt: skip
    x1, y1, x2, y2 = face.lips
    assert (x2 - x1, y2 - y1) == pytest.approx((abs(lips[1][0] - lips[0][0]), abs(lips[1][1] - lips[0][1])), abs=0.1)


def test_square_without_a_face_has_no_mesh(mesh: FaceMesh):
    assert mesh.look(spotted(200, 150), FaceSquare(500.0, 150.0, 100.0, 0.0)) is None


def test_another_release_without_weights_does_not_count_as_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: FaceMesh
):
    (tmp_path / "fake_weights" / "modules" / face_mesh.MESH).unlink()
    assert not is_installed()
    monkeypatch.setattr(face_mesh, "WEIGHTS", "no_such_package")
    assert not is_installed()


def test_tilt_of_a_face_is_that_of_its_eyes():
    points = np.array([[0.0, 0.0], [40.0, 60.0]])
    square = FaceSquare.around(points, np.array([[10.0, 10.0], [20.0, 20.0]]))
    assert (square.x, square.y, square.face_size) == (20, 30, 60)
    assert square.angle == pytest.approx(math.pi / 4)


# --- the real thing ---


@needs_mesh
@needs_media
@pytest.mark.parametrize(
    ("name", "centres"),
    [
        ("garden_woman", [(0.54, 0.4)]),
        ("kitchen_man", [(0.5, 0.28)]),
        ("kitchen_pair", [(0.62, 0.38)]),
        ("stage_trio", [(0.1, 0.35), (0.37, 0.26), (0.91, 0.38)]),
    ],
)
def test_mouths_of_real_clips_are_found_where_they_are(name: str, centres: list[tuple[float, float]]):
    path = SHARED / f"{name}.mp4"
    frames = read_clip(path, rate_hz=None, duration_s=0.5, fps=FPS).frames
    found = MouthFinder(FaceMesh()).find(frames, fps=FPS)
    height, width = frames.shape[1:3]
    for boxes in found:
        middles = [((x1 + x2) / 2 / width, (y1 + y2) / 2 / height) for x1, y1, x2, y2 in boxes]
        assert middles == [pytest.approx(centre, abs=0.04) for centre in centres]


@needs_mesh
@needs_media
def test_real_face_is_followed_when_the_picture_is_tilted():
    frame = Image.fromarray(read_clip(SHARED / "kitchen_man.mp4", rate_hz=None, duration_s=0.1).frames[0])
    faces = FaceMesh()
    (square,) = faces.detect(frame)
    upright = faces.look(frame, square)
    tilted = faces.look(frame.rotate(30, center=(square.x, square.y)), FaceSquare(square.x, square.y, square.side, 0.0))
    assert upright is not None and tilted is not None
    assert tilted.square.angle == pytest.approx(upright.square.angle - math.radians(30), abs=0.12)
