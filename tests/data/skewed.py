"""Facts of a skewed mixture: text, pictures of all shapes, videos from seconds to hours, sized by the package."""

import numpy as np

from qwenvl_jax.data.frames import public_opener
from qwenvl_jax.data.image import smart_resize
from qwenvl_jax.data.packing import SampleFacts
from qwenvl_jax.data.stream import Part

WEIGHTS = {"text": 0.35, "image": 0.4, "video": 0.25}


def skewed_facts(count: int, *, length: int, seed: int = 0) -> tuple[list[SampleFacts], tuple[Part, ...]]:
    """Samples that fit rows of `length` tokens, as many of each kind, and the mixture of them.

    Videos take at most seven tenths of a row, and frames get no smaller than 64 tokens.
    """
    rng = np.random.default_rng(seed)
    makers = {"text": _text, "image": _images, "video": _video}
    facts: list[SampleFacts] = []
    parts = []
    for kind, weight in WEIGHTS.items():
        begin = len(facts)
        while len(facts) < begin + count:
            tokens, frames = makers[kind](rng, length)
            if tokens <= length:
                facts.append(SampleFacts(f"{kind} {len(facts) - begin}", tokens, frames))
        parts.append(Part(np.arange(begin, len(facts))[:, None], kind, weight))
    return facts, tuple(parts)


def _text(rng: np.random.Generator, length: int) -> tuple[int, tuple[int, ...]]:
    return min(length, int(rng.lognormal(6.5, 1.1)) + 20), ()


def _images(rng: np.random.Generator, length: int) -> tuple[int, tuple[int, ...]]:
    frames = []
    for _ in range(min(int(rng.geometric(0.6)), 4)):
        height, width = np.clip(rng.lognormal(6.4, 0.6, 2), 40, 4000).astype(int).tolist()
        height, width = smart_resize(height, width, factor=32, min_pixels=65_536, max_pixels=4_194_304)
        frames.append(height * width // 256)
    return sum(frames) // 4 + int(rng.lognormal(5, 0.8)), tuple(frames)


def _video(rng: np.random.Generator, length: int) -> tuple[int, tuple[int, ...]]:
    opener = public_opener("qwen3_vl_4b")
    seconds = float(np.clip(rng.lognormal(4, 1.6), 2, 4 * 3600))
    budget = length * 7 // 10
    n = int(np.clip(seconds * rng.choice([0.5, 1, 2, 4], p=[0.2, 0.3, 0.4, 0.1]), 4, min(768, 2 * budget // 64)))
    sides = [(360, 640), (480, 640), (720, 1280), (1080, 1920), (1280, 720)]
    height, width = opener.generation.video_size(
        n,
        *sides[int(rng.integers(len(sides)))],
        factor=opener.video.factor,
        temporal_factor=opener.video.temporal_patch_size,
        cap_tokens=opener.video.cap_tokens,
        min_pixels=opener.video.min_pixels,
        max_pixels=opener.video.max_pixels,
        max_frame_tokens=640,
        max_video_tokens=budget,
    )
    groups = -(-n // 2)
    return groups * (height * width // 1024 + 9) + int(rng.lognormal(4.5, 0.6)), (height * width // 256,) * groups
