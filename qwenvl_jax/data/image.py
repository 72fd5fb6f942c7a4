"""Images: opening, sizing, resizing and cutting into patches, bit for bit as the reference does on the CPU.

Sizes are chosen by the rule of Qwen's `smart_resize`; pixels are resampled by the integer arithmetic of torchvision's
antialiased bicubic kernel on bytes. Patches stay bytes: the model normalises them through `pixel_table`.
"""

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from qwenvl_jax.errors import MediaError

MAX_SIDE_RATIO = 200
# Formats whose decoders stand alone; EPS, for one, would start another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def image_size(source) -> tuple[int, int]:
    """(height, width) in pixels, without decoding them.

    Args:
      source: path, the bytes of a file, `PIL.Image.Image`, or u8[H, W, 3] in RGB.

    Raises:
      MediaError: nothing there, not an image, or an array of another shape or dtype.
    """
    with _opened(source) as image:
        return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def read_image(source) -> np.ndarray:
    """u8[H, W, 3] of an image; transparency is laid on white, as transformers 5.23 does.

    Args:
      source: path, the bytes of a file, `PIL.Image.Image`, or u8[H, W, 3] in RGB.

    Raises:
      MediaError: as `image_size`, or the pixels cannot be decoded.
    """
    with _opened(source) as image:
        if isinstance(image, np.ndarray):
            return image
        try:
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                image = image.convert("RGBA")
                image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            name = f"image {source}" if isinstance(source, (str, Path)) else "an image"
            raise MediaError(
                f"{name} is damaged: its pixels cannot be decoded ({first_line(error)}); make or copy it again."
            ) from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _opened(source) -> Iterator[PIL.Image.Image | np.ndarray]:
    """An image as a user gives it; its size is known, its pixels need not be decoded yet. Files get closed."""
    if isinstance(source, PIL.Image.Image):
        yield source
    elif isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise MediaError(
                f"an image array must be uint8[height, width, 3] in RGB, got {source.dtype}{list(source.shape)}; "
                "convert it, or give a PIL.Image."
            )
        yield source
    elif isinstance(source, (str, Path)):
        path = check_file(source, "image")
        with _open(path, f"image {path}") as file:
            yield file
    elif isinstance(source, bytes):
        with image_of_bytes(source) as file:
            yield file
    else:
        raise MediaError(
            "an image must be a path, the bytes of a file, a PIL.Image or a uint8[height, width, 3] array, got "
            f"{type(source).__name__}."
        )


def image_of_bytes(data: bytes) -> PIL.Image.Image:
    """The image in the bytes of a file; its size is known, its pixels are decoded when they are wanted.

    Raises:
      MediaError: not an image.
    """
    return _open(io.BytesIO(data), f"an image of {len(data)} bytes")


def _open(file: Path | io.BytesIO, name: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(file, formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        said = "it is no PNG, JPEG, WebP, GIF, BMP or TIFF" if _is_unknown(error) else first_line(error)
        raise MediaError(f"{name} cannot be read as an image ({said}); give a PNG or JPEG.") from error


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, PIL.UnidentifiedImageError)


def check_file(source: str | Path, kind: str) -> Path:
    """The path of a file that is there and not empty.

    Raises:
      MediaError: it is missing, a folder, or of zero bytes.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise MediaError(f"{kind} {path} is a folder; give the path of a file.")
        if not path.exists():
            raise MediaError(f"{kind} {path} does not exist; check the path.")
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{kind} {path} is empty (0 bytes); make or copy it again.")
        if not path.is_file():
            raise MediaError(f"{kind} {path} is not a regular file; copy it to one.")
    except (OSError, ValueError) as error:
        raise MediaError(f"{kind} {str(path)!r} cannot be opened ({first_line(error)}); check the path.") from error
    return path


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width, multiples of `factor`, that an image of `height` x `width` is resized to.

    Both sides are rounded (half to even) to the factor; if the area then leaves [min_pixels, max_pixels], both are
    scaled by the root of the ratio and rounded towards the allowed side.

    Raises:
      MediaError: a side is zero, or more than 200 times the other.

    Reference: `smart_resize` of transformers' Qwen2-VL image processor.
    """
    check_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def check_ratio(height: int, width: int):
    """Raises MediaError for a side of zero, or one more than `MAX_SIDE_RATIO` times the other."""
    if min(height, width) < 1:
        raise MediaError(f"a picture of {height} x {width} pixels (height x width) has no pixels; give another.")
    if max(height, width) / min(height, width) > MAX_SIDE_RATIO:
        raise MediaError(
            f"the longer side must be at most {MAX_SIDE_RATIO} times the shorter one, got {height} x {width} pixels "
            "(height x width); crop it."
        )


@functools.lru_cache(maxsize=256)
def _taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Where each output pixel of one axis reads, and with which weights.

    Output o has its centre at c = (o + 1/2) r with r = in/out; it reads the pixels within 2 max(r, 1) of it, weighted
    by the cubic kernel with a = -1/2 stretched by max(r, 1), normalised in float64, then rounded (half away from zero)
    to as many fractional bits, at most 22, as keep the largest weight below 2^15.

    Returns:
      first i64[out], count i64[out], weights i16[out, most taps], and the number of fractional bits.

    Reference: ATen's `upsample_bicubic2d_aa` for uint8 on the CPU.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre_O = scale * (np.arange(size_out) + 0.5)
    first_O = np.maximum((centre_O - support + 0.5).astype(np.int64), 0)
    count_O = np.minimum((centre_O + support + 0.5).astype(np.int64), size_in) - first_O
    slot_J = np.arange(count_O.max())
    distance_OJ = np.abs((slot_J[None] + first_O[:, None] - centre_O[:, None] + 0.5) * (1.0 / stretch))
    a = -0.5
    near_OJ = ((a + 2) * distance_OJ - (a + 3)) * distance_OJ * distance_OJ + 1
    far_OJ = (((distance_OJ - 5) * distance_OJ + 8) * distance_OJ - 4) * a
    weight_OJ = np.where(distance_OJ < 1, near_OJ, np.where(distance_OJ < 2, far_OJ, 0.0))
    weight_OJ *= slot_J[None] < count_O[:, None]
    total_O = np.zeros(size_out)
    for j in slot_J:  # one tap after another, so that float64 rounds as the reference's running sum does
        total_O += weight_OJ[:, j]
    weight_OJ /= total_O[:, None]
    bits = max((p for p in range(1, 23) if int(0.5 + weight_OJ.max() * (1 << p)) < 1 << 15), default=0)
    scaled_OJ = weight_OJ * (1 << bits)
    weight_OJ = np.trunc(scaled_OJ + np.where(scaled_OJ < 0, -0.5, 0.5)).astype(np.int16)
    return first_O, count_O, weight_OJ, bits


@functools.lru_cache(maxsize=256)
def _paired_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """`_taps` where the pixels of an axis stand in pairs: the first pair, how many, and the weights of their pixels."""
    first_O, count_O, weight_OJ, bits = _taps(size_in, size_out)
    odd_O = first_O % 2
    pairs_O = (odd_O + count_O + 1) // 2
    paired_OJ = np.zeros((size_out, 2 * pairs_O.max()), np.int16)
    for odd in (0, 1):  # the pair of an odd first pixel begins one before it
        rows = odd_O == odd
        width = min(weight_OJ.shape[1], paired_OJ.shape[1] - odd)
        paired_OJ[rows, odd : odd + width] = weight_OJ[rows, :width]
    return first_O // 2, pairs_O, paired_OJ, bits


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic resampling of bytes.

    Rows first, rounded to bytes, then columns; an axis that keeps its size is left alone.

    Args:
      image: u8[H, W, 3].
      height, width: of the result, in pixels.

    Returns:
      u8[height, width, 3], bit-equal to `torchvision.transforms.v2.functional.resize(..., BICUBIC, antialias=True)`
      on a CPU.
    """
    from qwenvl_jax.data import resampling  # imports numba

    image = np.ascontiguousarray(image)
    if image.shape[1] != width:
        out = np.empty((image.shape[0], width, 3), np.uint8)
        resampling.horizontal(image, *_paired_taps(image.shape[1], width), out)
        image = out
    if image.shape[0] != height:
        rows = image.reshape(image.shape[0], -1)
        narrow = max(0, resampling.STRIP - rows.shape[1])
        rows = np.pad(rows, ((0, 0), (0, narrow))) if narrow else rows
        out = np.empty((height, rows.shape[1]), np.uint8)
        resampling.vertical(rows, *_taps(image.shape[0], height), out)
        image = np.ascontiguousarray(out[:, : 3 * width]).reshape(height, width, 3)
    return image


def patchify(frames: np.ndarray, *, patch_size: int, temporal_patch_size: int, merge_size: int) -> np.ndarray:
    """Cuts frames into patches in merge order.

    Two temporal patches of a 4 x 4 grid with 2 x 2 merging come as:

        0  1  4  5      16 17 20 21
        2  3  6  7      18 19 22 23
        8  9 12 13      24 25 28 29
       10 11 14 15      26 27 30 31

    Args:
      frames: u8[n, H, W, 3]; n a multiple of `temporal_patch_size`, H and W of `patch_size * merge_size`.

    Returns:
      u8[t*h*w, 3*tau*P*P], each patch flattened as (channel, temporal, row, column).
    """
    n, height, width, channels = frames.shape
    tau, m, side = temporal_patch_size, merge_size, patch_size
    rows, columns = height // (m * side), width // (m * side)
    blocks = frames.reshape(n // tau, tau, rows, m, side, columns, m, side, channels)
    #          t, tau, row, mr, y, col, mc, x, c  ->  t, row, col, mr, mc, c, tau, y, x
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(blocks).reshape(-1, channels * tau * side * side)


def pixel_table(
    mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float = 1 / 255, *, normalize: bool = True
) -> np.ndarray:
    """f32[3, 256]: what each byte of each channel is to the model, (x - 255 mean) / (255 std).

    Computed in float32 in the order of transformers' fused rescaling and normalisation, so that it is bit-equal to
    it. With `normalize` off, bytes are only rescaled.
    """
    byte_X = np.arange(256, dtype=np.float32)
    if not normalize:
        return np.repeat((byte_X * np.float32(rescale_factor))[None], 3, axis=0)
    unit = np.float32(1.0 / rescale_factor)
    mean_C1 = np.asarray(mean, np.float32)[:, None] * unit
    std_C1 = np.asarray(std, np.float32)[:, None] * unit
    return (byte_X[None] - mean_C1) / std_C1
