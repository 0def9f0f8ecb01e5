"""Frame codecs and shards: JPEG, raw or zstd frames one after another, with an index at the end of the file.

A shard is what zarr v3 calls ``sharding_indexed``: encoded inner chunks (here one frame each, every one followed by
its crc32c), then the index: (offset, length) as little-endian uint64 a frame, all ones for an absent frame, and the
index's own crc32c. A JPEG frame is a bare stream, so that it can be declared ``imagecodecs_jpeg`` and read by
zarr-python with the package imagecodecs-zarr; libjpeg-turbo on both sides gives the same pixels. Maps (depth, masks)
are compressed by zarr's own ``zstd``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numcodecs import zstd

from ..errors import ConfigError, SpecMismatchError, StoreError, did_you_mean
from .layout import bytes_codec, crc32c

MISSING = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
ZSTD_LEVEL = 3
VIDEO_CODEC, VIDEO_GROUP, VIDEO_CRF = "brachium.h264", 16, 20
"""Codec, frames a chunk and quality of the profile `video`."""
KINDS = {("imagecodecs_jpeg",): "jpeg", ("bytes",): "raw", ("bytes", "zstd"): "zstd", (VIDEO_CODEC,): "video"}
"""Names of zarr codecs -> how a frame is decoded here."""


@dataclass(frozen=True, kw_only=True)
class ImageProfile:
    """How frames are encoded.

    Attributes:
        name: Key in `PROFILES`.
        quality: JPEG quality, 1 to 100; 0 for frames without loss.
        subsampling: JPEG chroma subsampling, ``420`` or ``444``; empty for frames without loss.

    Frames of the profile `video` are recorded as JPEG and made a video at the commit: a crash finds whole frames.
    """

    name: str
    quality: int = 0
    subsampling: str = ""

    @property
    def group(self) -> int:
        """Frames a chunk."""
        return VIDEO_GROUP if self.name == "video" else 1

    @property
    def is_jpeg(self) -> bool:
        """True when frames are JPEG streams."""
        return self.quality > 0

    def encode(self, image: np.ndarray) -> bytes:
        """Encode (H, W, C): uint8 RGB as JPEG, anything without loss."""
        image = np.ascontiguousarray(image)
        if self.is_jpeg:
            return simplejpeg.encode_jpeg(image, self.quality, "RGB", self.subsampling)
        data = image.astype(image.dtype.newbyteorder("<"), copy=False).tobytes()
        return data if self.name == "raw" else bytes(zstd.compress(data, ZSTD_LEVEL))

    def zarr_codecs(self, dtype: np.dtype) -> list[dict[str, Any]]:
        """The codecs in zarr metadata that read one chunk of `dtype`."""
        if self.name == "video":
            return [{"name": VIDEO_CODEC, "configuration": {"crf": VIDEO_CRF}}]
        if self.is_jpeg:
            configuration = {"level": self.quality, "subsampling": self.subsampling}
            return [{"name": "imagecodecs_jpeg", "configuration": configuration}]
        if self.name == "raw":
            return [bytes_codec(dtype)]
        return [bytes_codec(dtype), {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}]


PROFILES = {
    p.name: p
    for p in (
        ImageProfile(name="jpeg", quality=95, subsampling="420"),
        ImageProfile(name="jpeg95-444", quality=95, subsampling="444"),
        ImageProfile(name="raw"),
        ImageProfile(name="video", quality=95, subsampling="444"),
    )
}
LOSSLESS = ImageProfile(name="zstd")
"""How maps are stored, whatever the profile of the cameras."""


def image_profile(name: str, quality: int | None = None) -> ImageProfile:
    """Return the profile `name`, with another JPEG quality if one is given.

    Raises:
        ConfigError: An unknown name, or a quality outside 1..100 or for frames without loss.
    """
    if name not in PROFILES:
        raise ConfigError(f"no image profile {name!r}. {did_you_mean(name, PROFILES)}")
    profile = PROFILES[name]
    if quality is None:
        return profile
    if not profile.is_jpeg or not 1 <= quality <= 100:
        raise ConfigError(f"expected a quality from 1 to 100 with a JPEG profile, got {quality} with {name!r}")
    return ImageProfile(name=name, quality=int(quality), subsampling=profile.subsampling)


def check_jpeg(data: bytes, shape: tuple[int, ...], where: str) -> None:
    """Raise SpecMismatchError unless `data` starts as a colour JPEG of `shape` (H, W, 3). Reads the header only."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise SpecMismatchError(f"{where}: expected a JPEG of shape {shape}, got {len(data)} bytes: {error}") from error
    if (height, width) != tuple(shape[:2]) or colour not in ("YCbCr", "RGB"):
        raise SpecMismatchError(f"{where}: expected a colour JPEG of shape {shape}, got {height}x{width} {colour}")


def decode_into(data: np.ndarray, out: np.ndarray, kind: str, step: int = 0) -> None:
    """Decode one encoded frame, uint8 (n,), into `out` (H, W, C), contiguous; the GIL is released meanwhile.

    Args:
        data: The stored bytes, without their crc.
        out: Where the pixels go, in the machine's byte order.
        kind: One of the values of `KINDS`.
        step: Number of the frame in its array, which says where in a video's group it stands.

    Raises:
        StoreError: Bytes that are no such image.
    """
    if kind == "jpeg":
        try:
            decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=out)
        except ValueError as error:
            raise StoreError(f"no decodable JPEG: {error}") from error
        if decoded.shape != out.shape:
            raise StoreError(f"expected shape {out.shape}, got {decoded.shape}")
        return
    if kind == "video":
        from .video_codec import decode_group

        frames = decode_group(data.tobytes())
        if frames.shape[1:] != out.shape:
            raise StoreError(f"expected shape {out.shape}, got {frames.shape[1:]}")
        out[...] = frames[step % len(frames)]
        return
    if kind == "zstd":
        try:
            data = np.frombuffer(zstd.decompress(data), np.uint8)
        except RuntimeError as error:
            raise StoreError(f"no decodable zstd frame: {error}") from error
    if data.nbytes != out.nbytes:
        raise StoreError(f"expected {out.nbytes} bytes, got {data.nbytes}")
    out[...] = np.frombuffer(data, out.dtype.newbyteorder("<")).reshape(out.shape)


def decoder(codecs: Sequence[str]) -> str | None:
    """Which of `KINDS` decodes frames with these zarr codecs, or None where only zarr can."""
    return KINDS.get(tuple(codecs))


def encode_index(offsets: np.ndarray, lengths: np.ndarray, shard: int) -> bytes:
    """Footer of a shard of `shard` frames whose first ``len(offsets)`` are there; lengths include each crc.

    An absent frame has `MISSING` as offset and as length.
    """
    index = np.full((shard, 2), MISSING, "<u8")
    index[: len(offsets), 0] = offsets
    index[: len(lengths), 1] = lengths
    data = index.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def decode_index(tail: bytes, shard: int, where: str) -> np.ndarray:
    """Inverse of `encode_index`: uint64 (shard, 2) of (offset, length).

    Raises:
        StoreError: An index that is short or does not fit its crc.
    """
    size = shard * 16
    if len(tail) != size + 4 or crc32c(tail[:size]) != int.from_bytes(tail[size:], "little"):
        raise StoreError(f"damaged store: the frame index of {where} does not fit its checksum")
    return np.frombuffer(tail, "<u8", count=2 * shard).reshape(shard, 2)
