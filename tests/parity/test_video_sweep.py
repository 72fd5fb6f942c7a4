"""Random videos for every generation: frames, sizes, grids, times, tokens, positions and pixels are the reference's.

A number stands for what is asked of a file of random size, rate and length, which two numbers share. The fast suite
goes through the first of them, the longer one through hundreds.
"""

import dataclasses
import functools

import numpy as np
import pytest

import qwenvl_jax as qv
from qwenvl_jax.data.video import VideoInfo, probe, read_frames
from qwenvl_jax.errors import MediaError
from tests.media import write_clip
from tests.parity import test_processor, test_processor_qwen2
from tests.parity.reference import transformers
from tests.support import generations
from tests.tiny import tiny_processor_folder

FAST, ALL = 20, 140  # numbers; each for three generations
RATES = ("8", "10", "12", "15", "24", "25", "30", "50", "60", "24000/1001", "30000/1001", "60000/1001", "25/2")


@dataclasses.dataclass(frozen=True)
class Case:
    """A file and what is asked of it.

    Attributes:
      info: of the file.
      frames: u8[n, 3, H, W], all of them.
      wish: of the sampler: fps or num_frames.
      limits: of its frames, min_frames and max_frames.
      pixels: smallest and largest area, of a clip of Qwen3-VL or a frame of the others.
    """

    info: VideoInfo
    frames: np.ndarray
    wish: dict
    limits: dict
    pixels: tuple[int, int]


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """The case of a number."""
    folder = tmp_path_factory.mktemp("clips")

    @functools.lru_cache(maxsize=1)
    def file(number: int) -> tuple[VideoInfo, np.ndarray]:
        rng = np.random.default_rng([5, number])
        n, height, width = (int(rng.integers(*bounds)) for bounds in ((2, 75), (20, 150), (20, 150)))
        coarse = rng.integers(0, 256, (n, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        frames = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
        info = probe(write_clip(folder / f"{number}.mp4", frames, fps=RATES[rng.integers(len(RATES))]))
        return info, np.stack(list(read_frames(info, np.arange(n)))).transpose(0, 3, 1, 2)

    def case(number: int) -> Case:
        rng = np.random.default_rng([6, number])
        info, frames = file(number // 2)
        n = len(frames)
        wish = (
            {"fps": float(rng.choice([0.5, 1, 2, 4, 7.5, 30, rng.uniform(0.2, 12)]))},
            {"num_frames": int(rng.integers(2, n + 1))},
            {"fps": 2.0},
        )[rng.integers(3)]
        low = int(rng.choice([1, 2, 4, rng.integers(1, 12)]))
        high = int(rng.choice([768, low + rng.integers(0, 20)]))
        smallest = int(rng.integers(1, 30)) * 1024
        return Case(
            info,
            frames,
            wish,
            {"min_frames": low, "max_frames": high},
            (smallest, smallest * int(rng.integers(2, 40))),
        )

    return case


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """By generation: ours, and the reference's."""
    found = {}
    for model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        folder = tmp_path_factory.mktemp(model_type)
        if model_type == "qwen3_vl":
            tiny_processor_folder(folder)
        else:
            test_processor_qwen2.write_folder(folder, model_type)
        found[model_type] = (
            qv.Processor.from_pretrained(folder, "transformers"),
            transformers.AutoProcessor.from_pretrained(folder),
        )
    return found


def reference_indices(reference, case: Case) -> list[int]:
    """The frames that the reference samples; its own error where it cannot."""
    n, fps = len(case.info.times), case.info.fps
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=n, fps=fps)
    return reference.video_processor.sample_frames(metadata, **case.wish).tolist()


def reference_inputs(reference, case: Case, indices: list[int], prompt: str):
    """What the reference makes of the file, sampling by itself where it does not ask for a frame after the last one."""
    n, rate = len(case.info.times), case.info.fps
    own = indices[-1] < n
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=n, fps=rate)
    if not own:
        metadata.frames_indices = indices[:-1]
    return reference(
        text=[prompt],
        videos=[case.frames if own else case.frames[indices[:-1]]],
        video_metadata=[metadata],
        do_sample_frames=own,
        size={"shortest_edge": case.pixels[0], "longest_edge": case.pixels[1]},
        return_tensors="pt",
        **({"fps": None, **case.wish} if own else {}),
    )


NUMBERS = [*range(FAST), *(pytest.param(k, marks=pytest.mark.slow) for k in range(FAST, ALL))]


@pytest.mark.parametrize("model_type", generations(("qwen2_vl", "qwen2_5_vl", "qwen3_vl")))
@pytest.mark.parametrize("number", NUMBERS)
def test_a_random_video_is_to_both_the_same(draw, processors, number, model_type):
    case, (processor, reference) = draw(number), processors[model_type]
    part = {"type": "video", "video": str(case.info.path), **case.wish, **case.limits}
    part |= {"min_pixels": case.pixels[0], "max_pixels": case.pixels[1]}
    conversation = [{"role": "user", "content": [part, {"type": "text", "text": "when?"}]}]
    for name, value in case.limits.items():  # its Qwen3-VL takes them from nowhere else
        setattr(reference.video_processor, name, value)
    try:
        indices = reference_indices(reference, case)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(MediaError, match="no fewer than 2"):
            processor([conversation])
        return
    prompt = reference.apply_chat_template(conversation, tokenize=False)
    if model_type == "qwen3_vl" and len(indices) < 2:
        with pytest.raises(ValueError, match="temporal_factor"):
            reference_inputs(reference, case, indices, prompt)
        with pytest.raises(MediaError, match="at least 2 sampled frames"):
            processor([conversation])
        return
    opened = processor.opener.open(part)
    assert opened.choice.indices.tolist() == [index for index in indices if index < len(case.info.times)]
    inputs = reference_inputs(reference, case, indices, prompt)
    batch = processor([conversation])
    assert list(opened.grid) == inputs["video_grid_thw"][0].tolist()
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"].numpy())
    np.testing.assert_array_equal(processor.pixel_values(batch), inputs["pixel_values_videos"].numpy())
    if model_type == "qwen3_vl":
        positions = test_processor.reference_positions(processor, inputs)
    else:
        positions = test_processor_qwen2.reference_positions(model_type, inputs)
    np.testing.assert_array_equal(batch.positions, positions)
