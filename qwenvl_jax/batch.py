"""`Batch`: the one value that the data side makes and the model side reads.

A `Batch` is a pytree of arrays whose leading axis is the batch (rows) or the vision group, so that it shards over the
data axes of a mesh as it is. Shapes follow the legend in `qwenvl_jax.dims`.

How a row looks (`p` a vision token, `.` padding), two samples packed:

    tokens        a b <p p p p> c | d e <p p> f . .
    segment_ids   1 1  1 1 1 1  1   2 2  2 2  2 0 0
    positions     start at 0 in every segment
    vision_index -1-1  0 1 2 3 -1  -1-1  8 9 -1-1-1     index into the merged tokens of the row's group

Rows are divided evenly among the groups, in order: row `b` belongs to group `b // (B // G)`. The merged tokens of a
group are those of its vision rows, bucket after bucket, row after row, four consecutive patches (with a merge of 2x2)
to a token.
"""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionRows:
    """Patches of one length bucket, whole frames laid side by side in rows of equal length.

    A frame here is what attends to itself in the tower: an image, or one temporal patch (two sampled frames) of a
    video. A frame never crosses a row. Patches stand in merge order: the four patches of a merged token are
    consecutive.

    Attributes:
      patches: u8[G, R, L, 3*tau*P*P], each flattened as (channel, temporal, row, column).
      coords: i32[G, R, L, 2], row and column of the patch in its frame, in patches.
      sizes: i32[G, R, L, 2], height and width of the patch's frame in patches; 1 in padding.
      segment_ids: i32[G, R, L], number of the frame in its row, from 1; 0 is padding.
      items: i32[G, R, L], number of the image or video in its group, in reading order from 1; 0 is padding.
      pixel_table: f32[G, 3, 256], the normalised value of each byte, per channel.
      windows: i32[G, R, L], number of the attention window in its row, from 1; 0 is padding. The patches of a window
        are consecutive: a frame's patches stand window after window. None for towers without windows.
    """

    patches: Array
    coords: Array
    sizes: Array
    segment_ids: Array
    items: Array
    pixel_table: Array
    windows: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows with their positions and the vision inputs they refer to.

    Attributes:
      tokens: i32[B, T].
      positions: i32[B, T, A], (time, height, width) for the public models; 0 in padding.
      segment_ids: i32[B, T], number of the sample in its row, from 1; 0 is padding, on the right.
      targets: i32[B, T], the token to predict at each slot, already shifted within each sample.
      loss_weights: f32[B, T], weight of each target in the loss; 0 where nothing is learnt.
      vision_index: i32[B, T], -1 for text, else the merged token of the row's group that stands here.
      vision: one `VisionRows` for each length bucket; empty for a batch of text.
      pool_index: i32[B, T, Q], the merged tokens of the row's group that each vision token is made of, the first of
        them that of `vision_index`; 0 at text. None for a batch without pooling.
      pool_weights: f32[B, T, Q], their weights, which sum to 1 at a vision token; 0 at text. None with `pool_index`.
      classes: i32[B, T], the class of each token's sample, for losses told apart: which data set it is of and whether
        it shows a video, an image or text alone, numbered from 1 (`qwenvl_jax.data.classes`); 0 is padding. None for a
        batch that is not for training.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    targets: Array
    loss_weights: Array
    vision_index: Array
    vision: tuple[VisionRows, ...] = ()
    pool_index: Array | None = None
    pool_weights: Array | None = None
    classes: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far.

    Attributes:
      keys, values: [Y, B, K, S, E], the layers stacked; a head's slots lie side by side, as what attends reads them, so
        that no compiler need turn them; carried through the layer scan and updated in place.
      lengths: i32[B], slots in use in each row; the next token is written at this slot, over padding if need be.
      next_positions: i32[B], the position (on all axes) of the next token.
    """

    keys: Array
    values: Array
    lengths: Array
    next_positions: Array
