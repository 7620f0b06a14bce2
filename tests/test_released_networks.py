"""SyncNet, S3FD and I3D as they are released: the published code's numbers for the same weights, and what follows.

The numbers are those of syncnet_python's networks, python_speech_features 0.6 and VideoGPT's I3D (cd-fvd 0.1.1).
"""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from avlit.errors import UserError
from avlit.metrics import face_tracks, registry
from avlit.metrics.clip import Clip
from avlit.metrics.face_tracks import S3FD, Track, cut_out, follow
from avlit.metrics.i3d import I3D
from avlit.metrics.metric import Tools
from avlit.metrics.state_file import read_state
from avlit.metrics.syncnet import SyncNet, at_25_fps, cepstra, compare, confidence, lag_distances
from tests.formula_weights import by_formula, wave


def picture(shape: tuple[int, ...]) -> np.ndarray:
    return np.round(127.5 + 127.5 * wave(shape)).astype(np.uint8)


def chirp() -> np.ndarray:
    time = np.arange(16000) / 16000
    return np.round(8000 * np.sin(2 * np.pi * (200 + 900 * time) * time))


# FVD


def test_fvd_reads_released_weights_and_has_their_logits_of_16_frames(tmp_path: Path) -> None:
    save_file(by_formula(I3D()).state_dict(), tmp_path / "i3d.safetensors")
    meter = registry.metrics()["FVD"].meter
    tools = Tools(weights={"i3d": tmp_path / "i3d.safetensors"})
    clip = Clip("a", 12.0, frames=picture((20, 64, 64, 3)), real=Clip("a", 12.0, frames=picture((20, 24, 24, 3))))
    measure = meter.open(tools)
    both = np.array(measure(clip)["FVD"])
    assert both.shape == (800,)
    expected = [18.504400, -1.114964, 5.080868, -13.596140], [16.982828, -1.212924, 4.844770, -12.652361]
    for found, known in zip(np.split(both, 2), expected, strict=True):
        np.testing.assert_allclose(found[:4], known, atol=2e-3)
    short = replace(clip, frames=picture((15, 8, 8, 3)))
    assert measure(short) == {} and not meter.applies(replace(clip, real=None))


def test_i3d_has_the_names_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        state = I3D().state_dict()
    assert len(state) == 344
    assert state["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert state["Mixed_4e.b2b.conv3d.weight"].shape == (64, 32, 3, 3, 3)
    assert state["Mixed_5c.b3b.bn.running_var"].shape == (128,)
    assert state["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1) and state["logits.conv3d.bias"].shape == (400,)


# SyncNet


@pytest.fixture(scope="module")
def syncnet() -> SyncNet:
    return by_formula(SyncNet())


@torch.no_grad()
def test_syncnet_embeds_lips_and_sound_as_the_published_network(syncnet: SyncNet) -> None:
    faces = torch.from_numpy(picture((12, 224, 224, 3))[:6, ..., ::-1].copy()).permute(3, 0, 1, 2).float()
    lips = syncnet.lips(faces)
    assert lips.shape == (2, 1024)
    np.testing.assert_allclose(
        lips[:, :3], [[904.9182, -1553.8358, 683.2041], [977.4798, -1612.1815, 641.8459]], atol=0.05
    )
    parts = torch.from_numpy(cepstra(chirp())).float().unfold(1, 20, 4).transpose(0, 1)
    np.testing.assert_allclose(
        syncnet.sound(parts[[0, 7]])[:, :3],
        [[135.61275, -43.50081, -75.46239], [176.19677, -37.34743, -22.27742]],
        atol=0.01,
    )


def test_cepstra_are_those_of_python_speech_features() -> None:
    found = cepstra(chirp())
    assert found.shape == (13, 99)
    known = [20.558774, 6.740962, -25.635986, -37.136272, -17.211573, 14.964004, 28.403649, 10.171990, -17.603974,
             -26.276440, -8.931910, 12.178655, 15.858782]  # fmt: skip
    np.testing.assert_allclose(found[:, 40], known, atol=1e-5)
    assert np.isfinite(cepstra(np.zeros(399))).all() and cepstra(np.zeros(399)).shape == (13, 1)


def test_confidence_knows_lips_that_follow_their_sound_and_by_how_much_they_are_late() -> None:
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(60, 8, generator=generator)
    sure, distance, lag = confidence(lag_distances(sound, sound))
    assert lag == 0 and distance < 1e-4 and sure > 2
    late = confidence(lag_distances(torch.roll(sound, 4, dims=0), sound))
    early = confidence(lag_distances(torch.roll(sound, -3, dims=0), sound))
    other = confidence(lag_distances(torch.randn(60, 8, generator=generator), sound))
    assert late[2] == 4 and early[2] == -3 and min(late[0], early[0]) > 1.5
    assert other[0] < 0.7 and other[1] > 2
    # The published evaluation, pair by pair.
    lips, padded = torch.roll(sound, 4, dims=0), np.pad(sound.numpy(), ((15, 15), (0, 0)))
    distances = [[math.dist(lips[i] + 1e-6, padded[i + shift]) for i in range(60)] for shift in range(31)]
    means = np.mean(distances, axis=1)
    np.testing.assert_allclose(lag_distances(lips, sound), means, rtol=1e-5)
    assert late[0] == pytest.approx(np.median(means) - min(means), rel=1e-5)


def test_frames_are_repeated_and_left_out_as_ffmpeg_does_for_25_a_second() -> None:
    def shown(count: int, fps: float) -> list[int]:
        return at_25_fps(np.arange(count)[:, None, None, None], fps).ravel().tolist()

    assert shown(4, 12.5) == [0, 0, 1, 1, 2, 2, 3, 3] and shown(6, 50) == [0, 2, 4] and shown(3, 25) == [0, 1, 2]
    assert shown(20, 30) == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19]
    assert shown(13, 24) == [*range(12), 11, 12]


def test_what_is_too_short_is_not_measured(syncnet: SyncNet) -> None:
    faces = np.zeros((6, 224, 224, 3), np.uint8)
    assert compare(syncnet, faces, np.zeros(16000)) is None
    assert compare(syncnet, np.zeros((30, 224, 224, 3), np.uint8), np.zeros(6 * 640)) is None


# Faces


def test_s3fd_finds_what_the_published_network_finds() -> None:
    network = by_formula(S3FD())
    shown = torch.from_numpy(picture((48, 40, 3)).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        faces = network(shown - torch.tensor(S3FD.MEAN).view(3, 1, 1))
    assert faces.shape == (159, 5)
    known = [[-0.1541212, -0.1401023, 0.2348141, 0.2087916, 0.4857542],
             [-0.1594832, 0.3574671, 0.2349557, 0.7105569, 0.5239642],
             [-0.3127585, -0.2445266, 0.5141822, 0.4172440, 0.5092423]]  # fmt: skip
    np.testing.assert_allclose(faces[::60], known, atol=1e-4)
    np.testing.assert_allclose(faces[-1], [-12.880146, -8.527756, 16.005603, 4.230578, 0.003176], atol=1e-3)
    assert network.find(np.zeros((64, 64, 3), np.uint8)).shape == (0, 4)  # too small to be looked at


def test_faces_are_followed_over_gaps_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face_tracks, "LEAST_TRACK", 8)

    def box(left: float, side: float = 120.0) -> torch.Tensor:
        return torch.tensor([left, 10.0, left + side, 10 + side])

    frames = [[box(2.0 * n), box(300.0)] for n in range(12)]
    frames[5] = [box(300.0)]  # the first is not found
    frames[9:] = [[box(300.0), box(600.0)] for _ in range(3)]  # and gone
    tracks = follow([torch.stack(each) for each in frames])
    assert [(track.first, len(track.boxes)) for track in tracks] == [(0, 9), (0, 12)]  # three frames are none
    np.testing.assert_allclose(tracks[0].boxes[5, 0], 10.0)  # between its neighbours
    small = [torch.stack([box(0.0, 90.0)])] * 12
    assert follow(small) == [] and follow([torch.zeros(0, 4)] * 12) == []


def test_a_face_is_cut_out_with_its_margin_and_grey_where_the_picture_ends() -> None:
    frames = np.tile(np.arange(200, dtype=np.uint8)[None, None, :, None], (9, 200, 1, 3))
    boxes = np.tile(np.array([60.0, 50.0, 140.0, 130.0]), (9, 1))
    faces = cut_out(frames, Track(0, boxes))
    assert faces.shape == (9, 224, 224, 3)
    # 40 % of half the box beyond its sides: columns 44 to 156.
    np.testing.assert_allclose(faces[4, 100, [0, -1], 0], [44, 155], atol=1)
    np.testing.assert_allclose(np.diff(faces[4, 100, :, 0].astype(int)).mean(), 112 / 224, atol=0.01)
    beyond = cut_out(frames, Track(0, boxes + np.array([80.0, 0.0, 80.0, 0.0])))
    assert (beyond[4, :, -20:] == face_tracks.GREY).all()


def test_the_whole_measure_reads_both_files_and_measures_the_face_that_speaks(
    tmp_path: Path, syncnet: SyncNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"syncnet": tmp_path / "syncnet_v2.model", "s3fd": tmp_path / "sfd_face.pth"}
    torch.save(syncnet.state_dict(), weights["syncnet"])
    torch.save(S3FD().state_dict(), weights["s3fd"])
    clip = Clip("a", 12.5, picture((6, 130, 130, 3)), chirp().astype(np.float32) / 32768, 16000)
    meter = registry.metrics()["Sync-C"].meter
    measure = meter.open(Tools(weights=weights))
    assert clip.frames is not None and measure(clip) == {}  # no face in it
    monkeypatch.setattr(face_tracks, "LEAST_TRACK", 8)
    monkeypatch.setattr(S3FD, "find", lambda self, frame: torch.tensor([[5.0, 5.0, 125.0, 125.0]]))
    found = measure(clip)
    faces = cut_out(at_25_fps(clip.frames, 12.5), Track(0, np.tile([5.0, 5.0, 125.0, 125.0], (12, 1))))
    known = compare(syncnet, faces, chirp()[: 12 * 640])
    assert known is not None
    assert [found["Sync-C"], found["Sync-D"]] == pytest.approx(known[:2]) == [found["LSE-C"], found["LSE-D"]]


# Files of weights


def test_a_file_of_another_network_or_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i3d.pt"
    meter = registry.metrics()["FVD"].meter
    torch.save({"logits.conv3d.bias": torch.zeros(400)}, path)
    with pytest.raises(UserError, match=r"weights.i3d=.*i3d.pt: is not I3D of Kinetics-400 .*Missing key"):
        meter.open(Tools(weights={"i3d": path}))
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (touched,)

    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    for text in (None, b"not a file of weights", b""):
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(UserError, match=r"weights.i3d=.*: is not I3D"):
            meter.open(Tools(weights={"i3d": path}))
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="is no file of tensors by name"):
        read_state(path)
    assert not touched.exists()
