"""Picture of one file and sound of another as one file, neither coded again."""

from pathlib import Path

import av
from av.error import FFmpegError

from avlit.media import MediaError


def join_streams(picture: Path, sound: Path, out: Path) -> None:
    """Write `out`, a Matroska file that shows `picture` and sounds of `sound`, from the beginning of both.

    MediaError: the one has no picture, the other no sound, or a file cannot be read.
    """
    try:
        with av.open(str(picture)) as shown, av.open(str(sound)) as heard, av.open(str(out), "w", "matroska") as joined:
            for path, container, kind in ((picture, shown, "video"), (sound, heard, "audio")):
                if not getattr(container.streams, kind):
                    raise MediaError(f"{path}: has no {kind} stream")
            pairs = [
                (container, stream, joined.add_stream_from_template(stream))
                for container, stream in ((shown, shown.streams.video[0]), (heard, heard.streams.audio[0]))
            ]
            for container, stream, target in pairs:
                for packet in container.demux(stream):
                    if packet.dts is not None:  # the last one is empty
                        packet.stream = target
                        joined.mux(packet)
    except FFmpegError as error:
        raise MediaError(f"{picture} and {sound.name} cannot be joined: {error}") from error
