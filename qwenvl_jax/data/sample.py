"""`Sample`: one conversation after the processor and before packing; plain NumPy on the host."""

import dataclasses

import numpy as np

from qwenvl_jax.data.pooling import Pool


@dataclasses.dataclass(frozen=True)
class Media:
    """One image or video as patches.

    Attributes:
      kind: "image" or "video".
      patches: u8[t*h*w, 3*tau*P*P], frame after frame, each frame in merge order (2x2 blocks of patches together).
      grid: (t, h, w), temporal patches and height and width in patches.
      times: seconds of each of the t temporal patches, as written in Qwen3-VL's prompts; empty for an image.
      pool: how its merged tokens are pooled, or None.
    """

    kind: str
    patches: np.ndarray
    grid: tuple[int, int, int]
    times: tuple[float, ...] = ()
    pool: Pool | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """Token ids with positions, targets and the media they refer to. n is the number of tokens.

    Attributes:
      tokens: i32[n].
      positions: i32[n, A], starting at 0.
      targets: i32[n], the next token; the last one repeats the final token with weight 0.
      loss_weights: f32[n], 1 where the target is the assistant's, else 0.
      vision_index: i32[n], -1 for text, else the merged token among all of this sample's media, in reading order;
        after pooling, where they are pooled.
      media: the images and videos in reading order.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    vision_index: np.ndarray
    media: tuple[Media, ...] = ()
