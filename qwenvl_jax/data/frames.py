"""Which frames of a video a model would see, and why: the work behind `qwenvl-jax data frames`."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.data import chat
from qwenvl_jax.data.files import check_remote, local_file
from qwenvl_jax.data.generations import find_generation
from qwenvl_jax.data.media import MediaOpener, Opened
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.settings import MediaConfig
from qwenvl_jax.data.times import time_text
from qwenvl_jax.data.video import VideoInfo, probe
from qwenvl_jax.presets import PRESETS

DEFAULT_MODEL = "qwen3_vl_4b"


@dataclasses.dataclass(frozen=True, eq=False)
class Preview:
    """What a video part becomes.

    Attributes:
      info: of the file.
      opened: the part, as a `Processor` opens it.
      opener: whose settings it was opened with.
    """

    info: VideoInfo
    opened: Opened
    opener: MediaOpener

    @property
    def tokens(self) -> int:
        """Tokens of the video in the prompt, merged and pooled, without its times and marks."""
        m = self.opener.video.merge_size
        return math.prod(self.opened.shown_grid(m)) // m**2

    def facts(self) -> dict[str, Any]:
        """The object that `--json` prints.

        duration, in seconds, and source_fps are the file's; frames are those taken, by their index and time in the
        file; groups are the temporal patches, with the mean time of their frames and what is written into the prompt
        (nothing for generations that write no times); grid is (t, h, w) in patches; tokens are merged and pooled ones.
        """
        choice = self.opened.choice
        assert choice is not None  # of a file
        written = self.opener.generation.written_times
        return {
            "duration": self.info.duration,
            "source_fps": self.info.fps,
            "frames": [
                {"index": index, "time": time, "why": why}
                for index, time, why in zip(choice.indices.tolist(), choice.times.tolist(), choice.why, strict=True)
            ],
            "groups": [{"time": time, "text": time_text(time) if written else ""} for time in self.opened.times],
            "grid": list(self.opened.grid),
            "tokens": self.tokens,
        }


def preview(part: dict, model: str | Path = DEFAULT_MODEL, remote_media: Sequence[str] = ()) -> Preview:
    """Opens a video part as a model's processor does, for a look at it.

    Args:
      part: `{"type": "video", "video": path, ...}` with options as in a conversation.
      model: a preset, for the settings of its public checkpoint, a folder or a hub id.
      remote_media: see `qwenvl_jax.data.processor.Processor.from_pretrained`.

    Raises:
      CheckpointError: there is no such model.
      ConversationError, MediaError: options or a file that cannot be used.
      ConfigError: remote media that are no beginnings of addresses.
    """
    remote = check_remote(remote_media)
    chat.check_conversation([{"role": "user", "content": [part]}])
    opener = public_opener(str(model)) if str(model) in PRESETS else Processor.from_pretrained(model).opener
    info = probe(local_file(part["video"], "video", remote))
    return Preview(info, opener.open({**part, "video": str(info.path)}), opener)


def public_opener(name: str) -> MediaOpener:
    """Opens media as the public checkpoint of a preset does, without its files; in the official dialect.

    Reference: `preprocessor_config.json` and `video_preprocessor_config.json` of the public checkpoints.
    """
    config = PRESETS[name]
    generation = find_generation(config.model_type, ())
    if generation.needs_video_file:
        images, videos = MediaConfig(65_536, 16_777_216), MediaConfig(4096, 25_165_824)
    else:
        images = videos = MediaConfig(3136, 12_845_056, patch_size=14)
    return MediaOpener(images, videos, generation, "official", config.tokens_per_second or 1)


def show(
    video: str,
    *,
    model: str | None = None,
    as_json: bool = False,
    out: str | None = None,
    remote_media: Sequence[str] = (),
    **options: Any,
) -> None:
    """Prints which frames are taken, as JSON or as a table, and draws them.

    Args:
      video: the file, or an address that `remote_media` allows.
      model, remote_media: see `preview`.
      out: file to draw a contact sheet and a timeline into; its ending says in which format.
      **options: of the video part; those that are None are left out.

    Raises:
      CheckpointError, ConversationError, MediaError: see `preview`.
      ConfigError: a format that cannot be drawn.
    """
    part = {"type": "video", "video": video, **{key: value for key, value in options.items() if value is not None}}
    seen = preview(part, model or DEFAULT_MODEL, remote_media)
    if out is not None:
        from qwenvl_jax.data.sheet import draw

        draw(seen, out)
    print(json.dumps(seen.facts(), indent=2) if as_json else table(seen))


def table(seen: Preview) -> str:
    """The facts of a video for reading, a line a frame."""
    facts, tau = seen.facts(), seen.opener.video.temporal_patch_size
    t, h, w = facts["grid"]
    frames = facts["frames"]
    pool = seen.opened.pool
    pooled = f" after pooling by {pool.side} ({pool.method})" if pool else ""
    lines = [
        f"{seen.info.name.removeprefix('video ')}: {facts['duration']:.3f} s, {facts['source_fps']:.3f} fps, "
        f"{seen.info.width} x {seen.info.height} pixels",
        f"{len(frames)} frames in {t} temporal patches of {h} x {w} patches: {facts['tokens']:,} vision tokens, "
        f"{facts['tokens'] // t} each{pooled}",
        "",
        f"{'frame':>7}  {'seconds':>10}  {'in the prompt':<18}why",
    ]
    for i, frame in enumerate(frames):
        text = facts["groups"][i // tau]["text"] if i % tau == 0 else ""
        lines.append(f"{frame['index']:>7}  {frame['time']:>10.3f}  {text:<18}{frame['why']}")
    return "\n".join(lines)
