"""What a plan takes for granted where a run would look at its data: vision rows, and what stands in a batch."""

import dataclasses

from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.packing import AUTO, BatchShape
from qwenvl_jax.flops import Work
from qwenvl_jax.train.config import StageConfig

# Merged tokens of the largest image of the public processors: 16,777,216 pixels at 32 x 32 a token.
_LARGEST_IMAGE = 16_384


@dataclasses.dataclass(frozen=True)
class Assumed:
    """A batch of a stage, without its data.

    Attributes:
      shape: with vision rows.
      work: what stands in it.
      classes: of its samples.
      notes: what was assumed, a sentence each.
    """

    shape: BatchShape
    work: Work
    classes: int
    notes: tuple[str, ...]


def assume(stage: StageConfig, model: QwenVLConfig, *, multiple: int = 1) -> Assumed:
    """A full batch of a stage.

    Every token slot holds a token, and each row is one sample: its attention is also what the kernel computes for a
    packed row. Where the stage leaves vision rows open, every token that is not of data of text is a vision token, and
    frames are as large as their caps allow: images `max_image_tokens`, those of videos `max_frame_tokens`.

    Args:
      model: its shape.
      multiple: of which the vision rows of a group are, as in `qwenvl_jax.train.curriculum.prepare_stages`.
    """
    shape, merge = stage.batch, model.vision.spatial_merge_size**2
    notes = [f"each row is one sample of {shape.length:,} tokens"]
    per_group = shape.rows // shape.groups * shape.length
    if shape.vision == AUTO:
        demand = {size: per_token * per_group for size, per_token in _frames(stage, merge).items()}
        vision = tuple(
            (-(-max(1, round(patches / size)) // multiple) * multiple, size) for size, patches in sorted(demand.items())
        )
        notes.append(
            f"vision rows, which a run chooses for its data, have {sum(demand.values()) / per_group:.1f} patches for "
            f"each token and frames of the largest size that the stage's caps allow: batch.vision={vision}"
        )
        shape = dataclasses.replace(shape, vision=vision)
        held = {size: min(rows * size, round(demand[size])) for rows, size in vision}
    else:
        held = {size: rows * size for rows, size in shape.buckets}
        if held:
            notes.append("vision rows are full, each with one frame")
    seen = Work.of_frames(model.vision, {size: shape.groups * count for size, count in held.items()})
    work = seen + Work(
        tokens=shape.rows * shape.length,
        vision_tokens=seen.patches // merge,
        text_pairs=shape.rows * shape.length * (shape.length + 1) // 2,
    )
    return Assumed(shape, work, len(stage.data.parts), tuple(notes))


def _frames(stage: StageConfig, merge: int) -> dict[int, float]:
    """Patches of a frame, and how many in frames of that size there are for each token of a batch."""
    data, budget = stage.data, stage.data.video_budget
    image = min(data.max_image_tokens or _LARGEST_IMAGE, stage.batch.length)
    frame = min(budget.max_frame_tokens or image, stage.batch.length)
    found: dict[int, float] = {}
    for modality, share in _shares(stage).items():
        if modality != "text":
            # Of pooled frames the caps count what is left.
            tokens, each = (frame, merge * budget.pool**2) if modality == "video" else (image, merge)
            found[tokens * each] = found.get(tokens * each, 0.0) + share * each
    return found


def _shares(stage: StageConfig) -> dict[str, float]:
    """Share of each modality, by the weights of the mixture; what has no name counts as images."""
    pairs = stage.data.modality_weights or [(part.modality or "image", part.weight) for part in stage.data.parts]
    weights: dict[str, float] = {}
    for modality, weight in pairs:
        weights[modality] = weights.get(modality, 0.0) + weight
    total = sum(weights.values())
    return {modality: weight / total for modality, weight in weights.items()} if total else {"image": 1.0}
