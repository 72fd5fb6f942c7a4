"""Images and videos of a conversation: opened and measured first, decoded when their patches are wanted."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.data import image, motion, positions, sampling, video
from qwenvl_jax.data.files import is_remote, local_file
from qwenvl_jax.data.generations import Generation
from qwenvl_jax.data.pooling import Pool
from qwenvl_jax.data.samplers import OPTIONS, SAMPLERS, Choice, Wish, clip_of
from qwenvl_jax.data.settings import MediaConfig
from qwenvl_jax.errors import ConversationError, MediaError

# Times count as evenly spaced if none is further from its place than a tenth of the spacing, and than a twentieth of a
# second, which is a tenth of a position of the public models. Frames picked evenly out of a film lie within that.
EVEN_SPACING = 0.1
EVEN_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Opened:
    """A medium that is measured, with the way to its patches.

    Attributes:
      part: of the conversation.
      kind: "image" or "video".
      size: (height, width) in pixels, as it comes.
      grid: (t, h, w) in patches.
      times: seconds of each temporal patch, the mean of its frames; empty for an image.
      steps: i32[t], time positions from the start of the medium, where they tell absolute time; else None.
      load: decodes; returns u8[t*h*w, 3*tau*P*P].
      choice: the frames of a video file, and why they were chosen; else None.
      pool: how its merged tokens are pooled, or None.
    """

    part: dict
    kind: str
    size: tuple[int, int]
    grid: tuple[int, int, int]
    times: tuple[float, ...]
    steps: np.ndarray | None
    load: Callable[[], np.ndarray]
    choice: Choice | None = None
    pool: Pool | None = None

    def shown_grid(self, merge_size: int) -> tuple[int, int, int]:
        """(t, h, w) in patches of a medium that would have as many tokens, and as they lie, without pooling."""
        if self.pool is None:
            return self.grid
        t, h, w = self.grid
        rows, columns = self.pool.grid(h // merge_size, w // merge_size)
        return t, rows * merge_size, columns * merge_size


@dataclasses.dataclass(frozen=True)
class _Frames:
    """The chosen frames of a video.

    Attributes:
      times: f64[n], seconds.
      size: (height, width) in pixels, as they come.
      even: whether they follow each other evenly.
      fps: frames chosen in a second of the whole clip, None where its duration is unknown.
      read: yields u8[height, width, 3] for each.
      choice: of a file's frames.
    """

    times: np.ndarray
    size: tuple[int, int]
    even: bool
    fps: float | None
    read: Callable[[], Iterable[np.ndarray]]
    choice: Choice | None = None


@dataclasses.dataclass(frozen=True)
class MediaOpener:
    """Opens images and videos as the model's folder says.

    Attributes:
      image, video: how they are sized and cut.
      generation, dialect: whose rules are followed.
      tokens_per_second: time positions in a second, where the generation's positions tell absolute time.
      remote: beginnings of the addresses of media that may be fetched, such as "gs://my-bucket/".
    """

    image: MediaConfig
    video: MediaConfig
    generation: Generation
    dialect: str
    tokens_per_second: float
    remote: tuple[str, ...] = ()

    def open(self, part: dict) -> Opened:
        """Chooses frames and size of the image or video of a part.

        Nothing is decoded, except by samplers that go by motion: those decode the file once at a small size.

        Raises:
          MediaError: it cannot be used, and why; named by its file.
          ConversationError: options that its kind of source does not take.
        """
        kind = part["type"]
        try:
            return self._open_image(part) if kind == "image" else self._open_video(part)
        except MediaError as error:
            if not isinstance(part[kind], (str, Path)) or str(error).startswith(f"{kind} "):
                raise
            raise type(error)(f"{kind} {part[kind]}: {error}") from error

    def _open_image(self, part: dict) -> Opened:
        config, source = self.image, part["image"]
        if is_remote(source):
            fetched = local_file(source, "image", self.remote)
            source = fetched.path.read_bytes()
        size = image.image_size(source)
        height, width = image.smart_resize(*size, factor=config.factor, **_pixel_bounds(part, config))

        def load() -> np.ndarray:
            frame = image.resize(image.read_image(source), height, width)
            return self._patches(np.repeat(frame[None], config.temporal_patch_size, axis=0))

        grid = (1, height // config.patch_size, width // config.patch_size)
        return Opened(part, "image", size, grid, (), None, load, pool=Pool.of(part))

    def _open_video(self, part: dict) -> Opened:
        config, frames, pool = self.video, self._frames_of(part), Pool.of(part)
        height, width = self._video_size(part, len(frames.times), frames.size)
        times = sampling.group_times(frames.times, config.temporal_patch_size)

        def load() -> np.ndarray:
            clip = np.empty((len(times) * config.temporal_patch_size, height, width, 3), np.uint8)
            n = 0
            for frame in frames.read():
                clip[n] = image.resize(frame, height, width)
                n += 1
            clip[n:] = clip[n - 1]  # an odd count repeats its last frame
            return self._patches(clip)

        grid = (len(times), height // config.patch_size, width // config.patch_size)
        return Opened(part, "video", frames.size, grid, times, self._steps(frames), load, frames.choice, pool)

    def _video_size(self, part: dict, n: int, size: tuple[int, int], *, capped: bool = True) -> tuple[int, int]:
        """Height and width that `n` frames of a size are resized to; not `capped` leaves out `max_video_tokens`."""
        config, pool = self.video, Pool.of(part)
        return sampling.pooled_size(
            self.generation.video_size,
            n,
            *size,
            factor=config.factor,
            temporal_factor=config.temporal_patch_size,
            cap_tokens=config.cap_tokens,
            max_frame_tokens=part.get("max_frame_tokens"),
            max_video_tokens=part.get("max_video_tokens") if capped else None,
            pool=pool.side if pool else 1,
            **_pixel_bounds(part, config),
        )

    def _most_frames(self, part: dict, n: int, size: tuple[int, int]) -> int:
        """How many of `n` frames are taken, so that none has fewer than `min_frame_tokens` for `max_video_tokens`.

        Frames that have fewer even without that cap stay as they are.
        """
        tau, pool, factor = self.video.temporal_patch_size, Pool.of(part), self.video.factor

        def tokens(groups: int, capped: bool) -> int:
            height, width = self._video_size(part, min(n, groups * tau), size, capped=capped)
            side = pool.side if pool else 1
            return -(-height // factor // side) * -(-width // factor // side)

        def least(groups: int) -> int:
            return min(part["min_frame_tokens"], tokens(groups, capped=False))

        groups = -(-n // tau)
        # Fewer frames are no smaller, so what is asked of each does not get less.
        for fewer in range(min(groups, part["max_video_tokens"] // least(groups)), 1, -1):
            with contextlib.suppress(MediaError):  # too many for the cap, however small
                if tokens(fewer, capped=True) >= least(fewer):
                    return min(n, fewer * tau)
        return min(n, tau)

    def _frames_of(self, part: dict) -> _Frames:
        """The frames of a video that are looked at: chosen by a sampler, or by the caller."""
        source = part["video"]
        if isinstance(source, video.VideoFrames):
            _refuse_options(
                part, (*OPTIONS, "sampler", "start", "end", "min_frame_tokens"), "the frames of qv.VideoFrames"
            )
            times = source.timestamps
            return _Frames(
                times=times,
                size=source.frames.shape[1:3],
                even=_evenly_spaced(times),
                fps=len(times) / source.duration if source.duration else None,
                read=lambda: source.frames,
            )
        if isinstance(source, (list, tuple)):
            return _images(part, source)
        if not isinstance(source, (str, Path, bytes)):
            raise MediaError(
                "a video must be a path, the bytes of a file, images with their timestamps, or qv.VideoFrames (frames "
                f"with their times), got {type(source).__name__}; the times of bare frames are unknown and never "
                "guessed."
            )
        info = video.probe(local_file(source, "video", self.remote))
        sampler = SAMPLERS[part.get("sampler") or "uniform"]
        clip = clip_of(info, part.get("start"), part.get("end"))
        scores = motion.motion_scores(info).part(clip.first, clip.first + len(clip.times)) if sampler.motion else None
        wish = self._wish(part, by_default=sampler.even)
        choice = sampler.choose(clip, scores, wish)
        if part.get("min_frame_tokens") is not None:
            most = self._most_frames(part, len(choice.indices), (info.height, info.width))
            if most < len(choice.indices):
                held = dataclasses.replace(wish, max_frames=most, min_frames=min(wish.min_frames, most))
                choice = sampler.choose(clip, scores, held)
        return _Frames(
            times=choice.times,
            size=(info.height, info.width),
            even=sampler.even and info.constant_rate,
            fps=len(choice.indices) / len(clip.times) * clip.fps,
            read=lambda: video.read_frames(info, choice.indices),
            choice=choice,
        )

    def _wish(self, part: dict, *, by_default: bool) -> Wish:
        """What a part asks of its sampler; the folder's where it says nothing, its `fps` only `by_default`."""
        config = self.video
        given = {key: part[key] for key in OPTIONS if part.get(key) is not None}
        if by_default and "fps" not in given and "num_frames" not in given:
            given["fps"] = config.fps
        low, high = given.get("min_frames"), given.get("max_frames")
        given["min_frames"] = low or min(config.min_frames, high or config.min_frames)
        given["max_frames"] = high or max(config.max_frames, low or config.max_frames)
        slow, fast = given.get("min_fps"), given.get("max_fps")
        given["min_fps"] = slow or min(Wish.min_fps, fast or Wish.min_fps)
        given["max_fps"] = fast or max(Wish.max_fps, slow or Wish.max_fps)
        return Wish(self.generation.sampling[self.dialect], **given)

    def _steps(self, frames: _Frames) -> np.ndarray | None:
        """Time positions of a video's temporal patches, where they tell absolute time.

        Evenly spaced frames follow the reference, which spreads them over the whole clip. It has no rule for others:
        each temporal patch then stands at the time of its first frame.
        """
        if not self.generation.absolute_time:
            return None
        tau = self.video.temporal_patch_size
        starts = frames.times[::tau]
        if len(starts) == 1:
            return np.zeros(1, np.int32)
        if not frames.even:
            return positions.steps_at_times(starts, self.tokens_per_second)
        if frames.fps is None:
            raise MediaError(
                f"{len(frames.times)} evenly spaced frames given with their times come without the duration that this "
                "model's time positions are computed from; give duration, the length in seconds of the clip they came "
                "from."
            )
        return positions.steps_at_rate(len(starts), self.tokens_per_second, tau / frames.fps)

    def _patches(self, frames: np.ndarray) -> np.ndarray:
        config = self.image
        return image.patchify(
            frames,
            patch_size=config.patch_size,
            temporal_patch_size=config.temporal_patch_size,
            merge_size=config.merge_size,
        )


def _refuse_options(part: dict, keys: Sequence[str], what: str):
    """Raises ConversationError for options of frames that are used as they are."""
    given = [key for key in keys if part.get(key) is not None]
    if given:
        raise ConversationError(f"{what} are used as they are; drop {' and '.join(given)}.")


def _images(part: dict, sources: Sequence[Any]) -> _Frames:
    """The frames of a video given as images; only one is held at a time."""
    _refuse_options(
        part,
        [key for key in (*OPTIONS, "sampler", "start", "end", "min_frame_tokens") if key != "timestamps"],
        "images",
    )
    if not len(sources):
        raise MediaError("a video given as images must have at least one.")
    times = video.known_times(part.get("timestamps"), len(sources), part.get("duration"))
    sizes = [image.image_size(source) for source in sources]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise MediaError(
            f"the images of a video must have one size, but image 0 has {sizes[0][0]} x {sizes[0][1]} pixels (height x "
            f"width) and image {other} has {sizes[other][0]} x {sizes[other][1]}; resize them."
        )
    return _Frames(
        times=times,
        size=sizes[0],
        even=_evenly_spaced(times),
        fps=len(times) / part["duration"] if part.get("duration") else None,
        read=lambda: map(image.read_image, sources),
    )


def _evenly_spaced(times: np.ndarray) -> bool:
    """Whether times lie evenly between the first and the last, within `EVEN_SPACING` and `EVEN_SECONDS`.

    Args:
      times: f64[n], seconds, not decreasing.
    """
    if len(times) < 2 or times[0] == times[-1]:
        return False  # nothing is spaced, and the times say all there is
    spacing = (times[-1] - times[0]) / (len(times) - 1)
    off = np.abs(times - np.linspace(times[0], times[-1], len(times))).max()
    return bool(off <= min(EVEN_SPACING * spacing, EVEN_SECONDS))


def _pixel_bounds(part: dict, config: MediaConfig) -> dict[str, int]:
    """min_pixels and max_pixels of a part, the folder's where it gives none; one given moves the other if need be."""
    low, high = part.get("min_pixels"), part.get("max_pixels")
    return {
        "min_pixels": low or (config.min_pixels if high is None else min(config.min_pixels, high)),
        "max_pixels": high or (config.max_pixels if low is None else max(config.max_pixels, low)),
    }
