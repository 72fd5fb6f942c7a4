"""Benchmark of the plan: how full steps of a skewed mixture are, and how long a step takes to plan.

    python -m tools.bench_packing
    python -m tools.bench_packing --shapes 64x8192x8 16x32768x4 --steps 1000

The mixture: 35 % text, 40 % pictures of all shapes (one to four of a sample), 25 % videos from 2 seconds to 4 hours at
0.5 to 4 fps, all sized by the package's own rules; videos take at most seven tenths of a row. Vision rows are those
that `batch.vision="auto"` chooses. A row of the printed table is a batch shape:

- rows x length x groups: of tokens, and the vision groups they are divided among; vision rows of a group;
- tokens, patches: real ones over slots, the mean over the steps and the least in one; steps without images and videos,
  which patches and balance leave out, are counted beside;
- balance: mean group over fullest group, in patches;
- video, image: shares of the samples (of 25 % and 40 % in the mixture);
- choosing: seconds to choose the vision rows; planning: milliseconds a step.
"""

import argparse
import time

import numpy as np

from qwenvl_jax.data.buckets import with_buckets
from qwenvl_jax.data.frames import public_opener
from qwenvl_jax.data.image import smart_resize
from qwenvl_jax.data.packing import BatchShape, Plan, SampleFacts
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


def measure(shape: BatchShape, steps: int, samples: int) -> str:
    """A row of the table."""
    facts, parts = skewed_facts(samples, length=shape.length)
    began = time.perf_counter()
    shape = with_buckets(shape, facts, parts, seed=0, merge=4)
    chosen = time.perf_counter()
    plan = Plan(facts, shape, seed=0, parts=parts, steps=steps)
    planned = [plan[n] for n in range(steps)]
    done = time.perf_counter()
    tokens = np.asarray([sum(facts[i].tokens for row in rows for i in row) for rows in planned])
    per_group = shape.rows // shape.groups
    patches = np.asarray([[sum(sum(facts[i].frames) for i in row) for row in rows] for rows in planned])
    groups = patches.reshape(steps, shape.groups, per_group).sum(axis=2)
    seen = groups[groups.any(axis=1)]
    of_tokens = tokens / (shape.rows * shape.length)
    of_patches = seen.sum(axis=1) / (shape.groups * sum(rows * length for rows, length in shape.buckets))
    kinds = [facts[i].name.split()[0] for rows in planned for row in rows for i in row]
    cells = [
        f"{shape.rows} x {shape.length:,} x {shape.groups}",
        ", ".join(f"{rows} x {length:,}" for rows, length in shape.buckets),
        f"{of_tokens.mean():.1%} ({of_tokens.min():.0%})",
        f"{of_patches.mean():.1%} ({of_patches.min():.0%})",
        str(steps - len(seen)),
        f"{(seen.mean(axis=1) / seen.max(axis=1)).mean():.1%}",
        f"{kinds.count('video') / len(kinds):.1%}, {kinds.count('image') / len(kinds):.1%}",
        f"{chosen - began:.0f}",
        f"{(done - chosen) / steps * 1000:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["32x4096x8", "64x8192x8", "16x16384x4", "8x32768x2", "4x32768x4"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="RxLxG", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=3000, help="of each kind; default: %(default)s")
    options = parser.parse_args()
    heads = ["rows x length x groups", "vision rows of a group", "tokens (least)", "patches (least)", "text-only steps"]
    heads += ["balance", "video, image", "choosing s", "planning ms"]
    print("| " + " | ".join(heads) + " |")
    print("| " + " | ".join("---" for _ in heads) + " |")
    for text in options.shapes:
        rows, length, groups = map(int, text.split("x"))
        print(measure(BatchShape(rows, length, groups, "auto"), options.steps, options.samples), flush=True)


if __name__ == "__main__":
    main()
