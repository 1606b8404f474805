"""Videos by PyAV: their frames as images, upright, and drawn frames as a video."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageOps

from overlock.extras import needing
from overlock.files import unwritable

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
CODECS = ("libx264", "mpeg4")
"""Of what is written, the first that this PyAV has."""
USUAL_RATE = Fraction(25)
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class DamagedVideoError(ValueError):
    """A video that cannot be read, or not to its end."""


def is_video(path: Path) -> bool:
    """Whether a file has the ending of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_frames(path: Path, *, every: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """Frames of a video and their numbers from 0 on, decoded while they are asked for, turned as the file says.

    Args:
        path: of the video.
        every: take one frame of so many.

    Raises:
        DamagedVideoError: where it cannot be decoded.
        ImportError: without PyAV.
    """
    av = _import(path)
    number = -1
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    yield number, _upright(frame)
    except (av.FFmpegError, IndexError) as error:  # the latter without a picture
        raise DamagedVideoError(f"the video is damaged ({error}); replace or remove the file") from None
    if number < 0:
        raise DamagedVideoError("the video has no frames; replace or remove the file")


def _upright(frame: Any) -> Image.Image:
    """A frame as it is to be seen: telephones store how they were held, not turned images."""
    image: Image.Image = frame.to_image()
    degrees = frame.rotation % 360  # against the clock
    if degrees in _TURNS:
        return image.transpose(_TURNS[degrees])
    return image.rotate(degrees, expand=True) if degrees else image


def frame_rate(path: Path) -> Fraction:
    """Frames a second of a video; the usual 25 where it does not say.

    Raises:
        ImportError: without PyAV.
    """
    av = _import(path)
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].average_rate or USUAL_RATE
    except (av.FFmpegError, IndexError):
        return USUAL_RATE


class VideoFile:
    """A video of images, written while they come; those of another size than the first are brought into its own.

    Args:
        path: of the file, in the form that its ending says.

    Raises:
        ImportError: without PyAV.
        ValueError: where the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self._av = path, _import(path)
        self._container: Any = None
        self._stream: Any = None

    def add(self, image: Image.Image, *, rate: Fraction) -> None:
        """Append a frame.

        Args:
            image: as RGB.
            rate: frames a second; that of the first counts.
        """
        try:
            if self._container is None:
                self._open(image, rate)
            size = (self._stream.width, self._stream.height)
            frame = self._av.VideoFrame.from_image(image if image.size == size else ImageOps.pad(image, size))
            self._container.mux(self._stream.encode(frame))
        except (OSError, self._av.FFmpegError) as error:
            raise unwritable(self.path, error) from None

    def close(self) -> None:
        """Write what is left."""
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode())
            self._container.close()
        except (OSError, self._av.FFmpegError) as error:
            raise unwritable(self.path, error) from None

    def _open(self, image: Image.Image, rate: Fraction) -> None:
        codec = next(name for name in CODECS if name in self._av.codecs_available)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(self.path), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=rate)
        self._stream.pix_fmt = "yuv420p"  # what every player shows; it takes even sides alone
        self._stream.width, self._stream.height = (max(2, side - side % 2) for side in image.size)


def _import(path: Path) -> ModuleType:
    with needing(f"{path}: videos need PyAV", "video"):
        import av  # noqa: PLC0415
    module: ModuleType = av
    return module
