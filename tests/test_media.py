"""Media files: what is written is read back in picture, sound and time; what cannot be read says why."""

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from avlit.media import (
    MediaClip,
    MediaError,
    MP4Writer,
    NoAudioError,
    NoVideoError,
    audio_length_s,
    contact_sheet,
    probe,
    read_audio,
    read_clip,
    read_image,
    write_mp4,
)

SHARED = Path(__file__).parents[2] / "shared" / "media"


def numbered_frames(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Grey frames whose brightness tells their number: 8 levels apart -> uint8 [F, H, W, 3]."""
    levels = (8 * (np.arange(num_frames) + 1)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def frame_numbers(frames: np.ndarray) -> list[int]:
    return [round(frame.mean() / 8) - 1 for frame in frames]


def moving_scene(num_frames: int = 25) -> np.ndarray:
    """A smooth picture that moves -> uint8 [F, 64, 64, 3]."""
    y, x = np.mgrid[0:64, 0:64]
    frames = [
        np.stack([128 + 90 * np.sin(x / 9 + shift / 3), 128 + 90 * np.cos(y / 11 - shift / 4), 2 * x + y], axis=-1)
        for shift in range(num_frames)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def chirps(seconds: float, rate_hz: int) -> np.ndarray:
    """A rising tone in pulses: its correlation has one sharp peak -> float32 [N]."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    tone = np.sin(2 * np.pi * (200 * time + 350 * time**2))
    return (0.4 * tone * (np.sin(2 * np.pi * 3 * time) > -0.3)).astype(np.float32)


def offset_of(found: np.ndarray, given: np.ndarray) -> int:
    """Samples by which `found` is late against `given`."""
    return int(np.correlate(found, given, "full").argmax()) - (len(given) - 1)


@pytest.fixture
def clip_path(tmp_path: Path) -> Path:
    """24 numbered frames at 24 fps with one second of chirps at 16 kHz."""
    path = tmp_path / "clip.mp4"
    write_mp4(path, numbered_frames(24), fps=24, waveform=chirps(1.0, 16000), rate_hz=16000, scale=1)
    return path


def test_a_written_clip_is_read_back_in_picture_sound_and_time(tmp_path: Path) -> None:
    frames, waveform = moving_scene(25), chirps(25 / 12, 16000)
    write_mp4(tmp_path / "a.mp4", frames, fps=12, waveform=waveform, rate_hz=16000, scale=1)
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.frames.shape == frames.shape and clip.fps == 12
    error = (clip.frames.astype(float) - frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 33
    assert clip.waveform is not None and clip.waveform.shape == waveform.shape and clip.waveform.dtype == np.float32
    assert np.corrcoef(clip.waveform, waveform)[0, 1] > 0.99
    assert offset_of(clip.waveform, waveform) == 0


def test_small_clips_are_written_large_enough_to_watch(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving_scene(5), fps=12)
    write_mp4(tmp_path / "b.mp4", moving_scene(5)[:, :33, :61], fps=12, scale=3)
    assert (probe(tmp_path / "a.mp4").height, probe(tmp_path / "a.mp4").width) == (256, 256)
    assert (probe(tmp_path / "b.mp4").height, probe(tmp_path / "b.mp4").width) == (100, 184)  # even, as yuv420p asks
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    assert not list(tmp_path.glob("*.part"))


def test_frames_are_taken_at_the_nearest_time_stamp(clip_path: Path) -> None:
    assert frame_numbers(read_clip(clip_path, fps=12).frames) == list(range(0, 24, 2))
    assert frame_numbers(read_clip(clip_path, fps=48).frames)[:6] == [0, 0, 1, 1, 2, 2]
    nearest = [round(index * 24 / 10) for index in range(10)]
    assert frame_numbers(read_clip(clip_path, fps=10).frames) == nearest


def test_a_window_is_the_same_part_of_the_whole(clip_path: Path) -> None:
    whole, window = read_clip(clip_path), read_clip(clip_path, start_s=0.5, duration_s=0.25)
    assert frame_numbers(window.frames) == list(range(12, 18))
    assert whole.waveform is not None and window.waveform is not None
    assert window.waveform.shape == (4000,)
    assert offset_of(window.waveform, whole.waveform[8000:12000]) == 0
    with pytest.raises(MediaError, match="no frame from 7 s on"):
        read_clip(clip_path, start_s=7.0)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (128, 96)])
def test_pictures_are_scaled_to_cover_and_cut_around_the_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.zeros((2, 64, 128, 3), np.uint8)
    frames[:, 24:40, 56:72] = 255  # a white square in the middle
    write_mp4(tmp_path / "a.mp4", frames, fps=12, scale=1)
    read = read_clip(tmp_path / "a.mp4", size=size, rate_hz=None).frames[0, :, :, 0] > 127
    assert read.shape == size
    rows, columns = np.nonzero(read)
    assert abs(rows.mean() - (size[0] - 1) / 2) <= 0.5 and abs(columns.mean() - (size[1] - 1) / 2) <= 0.5
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1  # still square
    assert abs(np.ptp(rows) + 1 - 16 * max(size[0] / 64, size[1] / 128)) <= 1.5


@pytest.mark.parametrize("rate_hz", [8000, 22050, 44100, 48000])
def test_sound_of_other_rates_is_resampled_without_delay(tmp_path: Path, rate_hz: int) -> None:
    write_mp4(tmp_path / "a.mp4", numbered_frames(12), fps=12, waveform=chirps(1.0, rate_hz), rate_hz=rate_hz, scale=1)
    assert probe(tmp_path / "a.mp4").rate_hz == rate_hz
    sound = read_clip(tmp_path / "a.mp4", rate_hz=16000).waveform
    assert sound is not None and sound.shape == (16000,)
    assert offset_of(sound, chirps(1.0, 16000)) == 0
    assert np.corrcoef(sound, chirps(1.0, 16000))[0, 1] > 0.98


def test_a_rate_that_aac_does_not_know_is_written_at_another(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", numbered_frames(12), fps=12, waveform=chirps(1.0, 10000), rate_hz=10000)
    assert probe(tmp_path / "a.mp4").rate_hz == 48000
    assert offset_of(read_audio(tmp_path / "a.mp4", 10000)[:10000], chirps(1.0, 10000)) == 0


@pytest.mark.parametrize(("subtype", "suffix"), [("PCM_16", "wav"), ("PCM_U8", "wav"), ("FLOAT", "wav"), ("", "flac")])
def test_stereo_sound_becomes_the_mean_of_its_channels(tmp_path: Path, subtype: str, suffix: str) -> None:
    left, right = chirps(0.5, 16000), np.zeros(8000, np.float32)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([left, right], axis=1), 16000, subtype=subtype or None)
    sound = read_audio(path, 16000)
    assert sound.shape == (8000,)
    np.testing.assert_allclose(sound, left / 2, atol=0.01)
    with pytest.raises(NoVideoError, match=r"a\.(wav|flac): has no video"):
        read_clip(path)


def test_sound_that_starts_late_keeps_its_place(tmp_path: Path) -> None:
    path, sound = tmp_path / "a.mkv", chirps(0.5, 16000)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=12)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for frame in numbered_frames(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        for start in range(0, len(sound), 1000):
            piece = (sound[None, start : start + 1000] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
            frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
            frame.pts = start + (4000 if start < 4000 else 6000)  # begins at 0.25 s, and pauses for 0.125 s
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    read = read_clip(path).waveform
    assert read is not None and read.shape == (16000,)
    expected = np.zeros(16000, np.float32)
    expected[4000:8000], expected[10000:14000] = sound[:4000], sound[4000:]
    np.testing.assert_allclose(read, expected, atol=0.01)
    part = read_audio(path, 16000, start_s=0.4, duration_s=0.3, after_picture=True)
    np.testing.assert_allclose(part, expected[6400:11200], atol=0.01)
    part = read_audio(path, 16000, start_s=0.15, duration_s=0.3)  # after its own beginning
    np.testing.assert_allclose(part, expected[6400:11200], atol=0.01)


def test_a_turned_clip_is_shown_upright(tmp_path: Path) -> None:
    frames = np.zeros((2, 64, 96, 3), np.uint8)
    frames[:, :, :32] = 255  # white on the left
    write_mp4(tmp_path / "a.mp4", frames, fps=12, scale=1)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO 14496-12: 4 of the name, 40 before the matrix
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # as a phone held upright writes
    content[matrix : matrix + 36] = quarter
    (tmp_path / "b.mp4").write_bytes(content)
    upright = read_clip(tmp_path / "b.mp4", rate_hz=None).frames[0]
    assert upright.shape == (96, 64, 3)
    assert upright[:24].mean() > 240 and upright[40:].mean() < 15  # turned clockwise: the left side is on top
    assert read_clip(tmp_path / "b.mp4", rate_hz=None, size=(48, 32)).frames[0, :12].mean() > 240


def test_missing_sound_is_its_own_error_and_can_be_asked_for(tmp_path: Path) -> None:
    write_mp4(tmp_path / "mute.mp4", numbered_frames(5), fps=12, scale=1)
    with pytest.raises(NoAudioError, match=r"mute\.mp4: has no audio stream"):
        read_clip(tmp_path / "mute.mp4")
    with pytest.raises(NoAudioError):
        read_audio(tmp_path / "mute.mp4", 16000)
    clip = read_clip(tmp_path / "mute.mp4", rate_hz=None)
    assert clip.waveform is None and len(clip.frames) == 5
    assert probe(tmp_path / "mute.mp4").rate_hz is None


@pytest.mark.parametrize("kind", ["empty", "text", "page", "headless", "missing", "folder"])
def test_files_that_are_no_media_are_refused_by_name(tmp_path: Path, clip_path: Path, kind: str) -> None:
    path = tmp_path / "broken.mp4"
    contents = {
        "empty": b"", "text": b"not a film\n" * 50, "page": b"<html><body>404</body></html>",
        "headless": clip_path.read_bytes()[2000:],
    }  # fmt: skip
    if kind == "folder":
        path.mkdir()
    elif kind in contents:
        path.write_bytes(contents[kind])
    for read in (read_clip, probe):
        with pytest.raises(MediaError, match=r"broken\.mp4: "):
            read(path)
    with pytest.raises(MediaError, match=r"broken\.mp4: "):
        read_audio(path, 16000)


def test_a_file_that_breaks_off_is_refused_not_shortened(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, fps=12, waveform=chirps(4.0, 16000), rate_hz=16000, scale=1)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"half\.mp4: .*(cut off|breaks off)"):
        read_clip(tmp_path / "half.mp4")
    start = read_clip(tmp_path / "half.mp4", duration_s=1.0, rate_hz=None)  # what is there can still be used
    assert len(start.frames) == 12


def test_wrong_arrays_are_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "a.mp4", np.zeros((5, 64, 64, 3), np.float32), fps=12)
    with pytest.raises(ValueError, match="rate_hz=None"):
        write_mp4(tmp_path / "a.mp4", numbered_frames(5), fps=12, waveform=np.zeros(100, np.float32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("rate_hz", [44100, 32000])
def test_a_part_of_a_sound_is_the_same_part_of_the_whole(tmp_path: Path, suffix: str, rate_hz: int) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 6 * rate_hz).cumsum()
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.5 * sound / np.abs(sound).max(), rate_hz)
    whole = read_audio(path, 16000)
    for start_s, duration_s in ((0.0, 1.0), (4 / 12, 0.75), (2.5, 1.5), (57 / 16, 1.1)):
        first, count = round(start_s * 16000), round(duration_s * 16000)
        part = read_audio(path, 16000, start_s=start_s, duration_s=duration_s)
        np.testing.assert_allclose(part, whole[first : first + count], rtol=0, atol=0 if suffix != "ogg" else 1e-6)
    assert len(read_audio(path, 16000, start_s=5.9, duration_s=1.0)) == len(whole) - 94400
    assert audio_length_s(path) == pytest.approx(len(whole) / 16000, abs=1e-3)


def test_sound_that_is_cut_off_is_refused_when_its_length_is_asked(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 64000).astype(np.float32)
    write_mp4(tmp_path / "a.mp4", numbered_frames(48), fps=12, waveform=noise, rate_hz=16000, scale=1)
    assert audio_length_s(tmp_path / "a.mp4") == pytest.approx(4, abs=0.1)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(MediaError, match=r"half\.mp4: (is cut off; it declares 4\.\d+ s of sound|its sound cannot)"):
        audio_length_s(tmp_path / "half.mp4")
    write_mp4(tmp_path / "mute.mp4", numbered_frames(5), fps=12, scale=1)
    with pytest.raises(NoAudioError, match=r"mute\.mp4"):
        audio_length_s(tmp_path / "mute.mp4")


def test_a_picture_is_upright_covers_and_is_cut_around_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 200  # the middle 40 columns
    for name in ("a.png", "a.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
        read = read_image(tmp_path / name, size=(80, 80))
        assert read.shape == (80, 80, 3) and abs(read[40, 5:75].astype(int) - 200).max() < 12
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn clockwise, as a phone held upright writes
    turned.save(tmp_path / "turned.jpg", exif=exif)
    upright = read_image(tmp_path / "turned.jpg", size=(100, 40))
    assert upright[50].mean() > 180 and upright[10].mean() < 20
    for name, content in (("text.png", b"no picture"), ("half.png", (tmp_path / "a.png").read_bytes()[:60])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=rf"{name}: cannot be read as a picture"):
            read_image(tmp_path / name, size=(8, 8))
    with pytest.raises(MediaError, match=r"nowhere\.png: there is no such file"):
        read_image(tmp_path / "nowhere.png", size=(8, 8))


def test_a_clip_written_in_pieces_plays_as_one_written_at_once(tmp_path: Path) -> None:
    frames, sound = moving_scene(25), chirps(25 / 12, 48000)
    write_mp4(tmp_path / "whole.mp4", frames, fps=12, waveform=sound, rate_hz=48000)
    with MP4Writer(tmp_path / "pieces.mp4", size=(64, 64), fps=12, rate_hz=48000) as movie:
        for start, end in ((0, 7), (7, 8), (8, 25)):
            movie.write(frames[start:end], sound[start * 4000 : end * 4000])
            assert not (tmp_path / "pieces.mp4").exists()
    whole, pieces = (read_clip(tmp_path / name, rate_hz=48000) for name in ("whole.mp4", "pieces.mp4"))
    assert np.array_equal(whole.frames, pieces.frames)
    assert whole.waveform is not None and pieces.waveform is not None
    assert np.array_equal(whole.waveform, pieces.waveform)


def test_a_clip_that_fails_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), MP4Writer(tmp_path / "a.mp4", size=(64, 64), fps=12) as movie:
        movie.write(numbered_frames(3))
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"before"


def test_a_writer_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rate_hz=10000: AAC has the rates"):
        MP4Writer(tmp_path / "a.mp4", size=(64, 64), fps=12, rate_hz=10000)
    with MP4Writer(tmp_path / "a.mp4", size=(64, 64), fps=12, rate_hz=16000) as movie:
        with pytest.raises(ValueError, match=r"frames of shape \(3, 32, 64, 3\)"):
            movie.write(numbered_frames(3, height=32), np.zeros(4000, np.float32))
        with pytest.raises(ValueError, match="sound of shape None: this MP4 has mono sound"):
            movie.write(numbered_frames(3))
        movie.write(numbered_frames(3), np.zeros(4000, np.float32))


def test_contact_sheet_shows_frames_over_the_sound_of_their_time(tmp_path: Path) -> None:
    sound = np.zeros(16000, np.float32)
    sound[12000:] = chirps(0.25, 16000)  # the last quarter
    frames = numbered_frames(16)
    contact_sheet(
        tmp_path / "sheet.png", [frames, frames[:, :32]], waveforms=[sound, sound], rate_hz=16000,
        labels=["short", "a long caption " * 40], columns=4,
    )  # fmt: skip
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 4 * 256  # the wider clip's frames, scaled to one height
    column_levels = [round(float(sheet[60, 64 + 128 * column].mean()) / 8) - 1 for column in range(4)]
    assert column_levels == [2, 6, 10, 14]  # the middles of the quarters
    mel = sheet[170:200, :512].astype(float).mean((0, 2))
    assert mel[:350].max() < 5 and mel[400:].mean() > 10
    with pytest.raises(ValueError, match="1 clips, 1 waveforms, 2 labels"):
        contact_sheet(tmp_path / "b.png", [frames], waveforms=[sound], rate_hz=16000, labels=["a", "b"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real clips are not beside this checkout")
def test_real_clips_and_sounds_are_read() -> None:
    for path in sorted(SHARED.glob("clips/*.mp4"))[:2]:
        clip: MediaClip = read_clip(path, fps=12, size=(64, 64), duration_s=0.5)
        assert clip.frames.shape == (6, 64, 64, 3) and clip.frames.std() > 10
        assert clip.waveform is not None and clip.waveform.shape == (8000,)
    for path in sorted(SHARED.glob("digits/*.wav"))[:2]:
        samples, rate_hz = soundfile.read(path)
        sound = read_audio(path, 16000)
        assert rate_hz == 8000 and len(sound) == 2 * len(samples) and 0.01 < np.abs(sound).max() <= 1


def test_media_does_not_load_diffusers_or_transformers() -> None:
    code = "import sys, avlit.media, avlit.codecs.build; print({'diffusers', 'transformers'} & sys.modules.keys())"
    root = Path(__file__).parents[1]
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert loaded.strip() == "set()"
