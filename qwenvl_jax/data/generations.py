"""What differs between the generations of Qwen-VL on the way from files to a batch; each difference is a field here."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from qwenvl_jax.data import coordinates, sampling
from qwenvl_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of models.

    Attributes:
      model_types: what `model_type` says in config.json.
      processor_class: of transformers, as preprocessor files name it.
      video_processor: of transformers; several generations may share one.
      needs_video_file: whether a folder must have video_preprocessor_config.json; without, videos take the numbers of
        preprocessor_config.json.
      older_video_keys: whether `min_pixels` and `max_pixels` go before `size` in the file that videos are read from, as
        they do in every file for images; else they only stand in for it.
      sampling: for each dialect the rule by which frames of a file are chosen, of `qwenvl_jax.data.sampling`.
      video_size: the rule for the size of a video's frames, and with it whether pixels are counted by clip or by frame.
      max_video_tokens: what the rule's cap is where it is switched on without a number.
      written_times: whether each temporal patch of a video stands apart in the text, after its time in seconds; else a
        video is one run of vision tokens.
      absolute_time: whether the time axis of a video's positions counts parts of a second; else temporal patches.
      windows: whether the tower attends within windows.
      coordinates: how boxes and points are counted in what the model says.
    """

    model_types: tuple[str, ...]
    processor_class: str
    video_processor: str
    needs_video_file: bool
    older_video_keys: bool
    sampling: dict[str, Callable[..., np.ndarray]]
    video_size: Callable[..., tuple[int, int]]
    max_video_tokens: int
    written_times: bool
    absolute_time: bool
    windows: bool
    coordinates: coordinates.Convention


QWEN2_VL = Generation(
    model_types=("qwen2_vl",),
    processor_class="Qwen2VLProcessor",
    video_processor="Qwen2VLVideoProcessor",
    needs_video_file=False,
    older_video_keys=True,
    sampling={"official": sampling.even_indices, "transformers": sampling.stepped_indices},
    video_size=sampling.frame_size,
    max_video_tokens=128_000,
    written_times=False,
    absolute_time=False,
    windows=False,
    coordinates=coordinates.BELOW_THOUSAND,
)
QWEN2_5_VL = dataclasses.replace(
    QWEN2_VL,
    model_types=("qwen2_5_vl",),
    processor_class="Qwen2_5_VLProcessor",
    absolute_time=True,
    windows=True,
    coordinates=coordinates.RESIZED_PIXELS,
)
QWEN3_VL = Generation(
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    processor_class="Qwen3VLProcessor",
    video_processor="Qwen3VLVideoProcessor",
    needs_video_file=True,
    older_video_keys=False,
    sampling={"official": sampling.uniform_indices, "transformers": sampling.uniform_indices},
    video_size=sampling.clip_size,
    max_video_tokens=768,
    written_times=True,
    absolute_time=False,
    windows=False,
    coordinates=coordinates.THOUSANDTHS,
)
GENERATIONS = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)


def find_generation(model_type: str | None, classes: Iterable[str]) -> Generation:
    """The generation that a folder's files speak of.

    Args:
      model_type: what config.json says, or None where it says nothing.
      classes: names of transformers' classes in the other files, the most telling first.

    Raises:
      CheckpointError: a model that is none of these, or files that do not tell.
    """
    known = ", ".join(name for g in GENERATIONS for name in g.model_types)
    if model_type is not None:
        found = [g for g in GENERATIONS if model_type in g.model_types]
        if not found:
            raise CheckpointError(
                f"config.json has model_type {model_type!r}; it must be one of {known}: give a folder of such a model."
            )
        return found[0]
    for name in classes:
        found = [g for g in GENERATIONS if name in (g.processor_class, g.video_processor, f"{g.video_processor}Fast")]
        if len(found) == 1:
            return found[0]
    processors = " or ".join(g.processor_class for g in GENERATIONS)
    raise CheckpointError(
        f"nothing says which Qwen-VL this is: expected config.json with model_type one of {known}, or "
        f"preprocessor_config.json with processor_class {processors}; copy config.json from the model."
    )
