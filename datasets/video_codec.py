"""Groups of pictures as H.264, for archives: a tenth of the size of JPEG, and ten times dearer at random.

One chunk is one closed group: an elementary stream (Annex B) that begins with a key frame and refers to nothing else.
For zarr-python the codec is called ``brachium.h264``; the class here is found by its entry point.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from ..errors import SpecMismatchError, StoreError

NAME = "brachium.h264"
GROUP = 16
"""Frames a group."""
CRF = 20


def encode_group(frames: np.ndarray, crf: int = CRF) -> bytes:
    """Encode uint8 (n, H, W, 3) RGB as one closed group; the same bytes for the same frames.

    Raises:
        SpecMismatchError: Odd heights or widths, which 4:2:0 cannot hold.
    """
    import av

    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise SpecMismatchError(f"video needs even heights and widths, got {frames.shape[1:3]}: use profile=jpeg")
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width, encoder.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 30), Fraction(30)
    encoder.options = {"crf": str(crf), "g": str(len(frames)), "bf": "0", "preset": "fast", "threads": "1"}
    packets = []
    for number, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = number
        packets += [bytes(packet) for packet in encoder.encode(frame)]
    return b"".join([*packets, *(bytes(packet) for packet in encoder.encode(None))])


@functools.lru_cache(maxsize=16)
def decode_group(data: bytes) -> np.ndarray:
    """Decode one group: read-only uint8 (n, H, W, 3). The last few are kept, as neighbours are often asked for.

    Raises:
        StoreError: Bytes that are no such group.
    """
    import av

    decoder: Any = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    frames: list[Any] = []
    try:
        for packet in [*decoder.parse(data), *decoder.parse(None)]:
            frames += decoder.decode(packet)
        frames += decoder.decode(None)
    except av.error.FFmpegError as error:
        raise StoreError(f"no decodable video: {error}") from error
    if not frames:
        raise StoreError("no decodable video: it holds no frames")
    decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    decoded.flags.writeable = False
    return decoded


@dataclass(frozen=True)
class VideoCodec(ArrayBytesCodec):
    """The codec as zarr-python asks for it."""

    crf: int = CRF
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from zarr metadata."""
        return cls(**(data.get("configuration") or {}))

    def to_dict(self) -> dict[str, Any]:
        """Zarr metadata."""
        return {"name": NAME, "configuration": {"crf": self.crf}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Nobody knows before it is encoded."""
        raise NotImplementedError

    def _decode_sync(self, data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        decoded = decode_group(data.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(decoded.reshape(chunk_spec.shape).copy())

    def _encode_sync(self, data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return chunk_spec.prototype.buffer.from_bytes(encode_group(data.as_numpy_array(), self.crf))

    async def _decode_single(self, data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return self._decode_sync(data, chunk_spec)

    async def _encode_single(self, data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return self._encode_sync(data, chunk_spec)


def groups(frames: Iterable[np.ndarray], size: int = GROUP) -> Iterable[np.ndarray]:
    """Cut frames (H, W, 3) into groups (size, H, W, 3); the last one repeats its last frame."""
    held: list[np.ndarray] = []
    for frame in frames:
        held.append(frame)
        if len(held) == size:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack([*held, *[held[-1]] * (size - len(held))])
