"""Measures what making batches costs beside decoding, and what worker processes bring.

    .venv/bin/python -m tools.bench_loader

Clips of 720p at 30 frames a second, eight seconds each, with key frames and B-frames as encoders write them, are
sampled at 2 fps. In turn, `--rounds` times, and all with one thread and no cache:

    decoding   the frames of all clips, probed, decoded, resized and cut into patches: `Processor.opener` alone
    batches    the same clips, planned, through the loader: tokens, positions, packing, hashes, Grain

Both read every clip as often. Then the time of a step with other numbers of threads and of workers, and how long a
consumer that works as long as `--busy` times a step's decoding takes waits for its batches.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qwenvl_jax.data.facts import measure_source
from qwenvl_jax.data.ffmpeg_child import ffmpeg_program
from qwenvl_jax.data.kept import Kept
from qwenvl_jax.data.packing import BatchShape, Plan
from qwenvl_jax.data.pipeline import BatchLoader, SampleCache, batches
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.data.sources import open_source
from qwenvl_jax.demo.vocabulary import write_processor_folder
from tools.machine import machine

SHAPE = BatchShape(rows=1, length=8192, vision=((40, 1024),))
PART = {"fps": 2.0, "max_video_tokens": 4096, "max_frame_tokens": 256}


def main() -> None:
    """Prints tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--busy", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument("--place", default=tempfile.gettempdir(), help="for the files; default: %(default)s")
    options = parser.parse_args()
    print(machine() + "\n")
    with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=options.place) as folder:
        _measure(Path(folder), options)


def _measure(folder: Path, options: argparse.Namespace) -> None:
    paths = [_make(folder / f"{n}.mp4", n) for n in range(options.clips)]
    write_processor_folder(folder / "processor")
    processor = Processor.from_pretrained(folder / "processor")
    parts = [{"type": "video", "video": str(path), **PART} for path in paths]
    said = {"role": "assistant", "content": "a red square appears"}
    source = open_source(
        [{"id": str(n), "messages": [{"role": "user", "content": [part]}, said]} for n, part in enumerate(parts)]
    )
    facts = measure_source(source, processor)

    def loader() -> BatchLoader:
        plan = Plan(facts, SHAPE, seed=0, shuffle=False, window=1)
        return BatchLoader(plan, SampleCache(source, processor, kept=Kept(0)), processor)

    def decode() -> None:
        for part in parts:
            processor.opener.open(part).load()

    def load(**options_of_loader) -> None:
        for _ in batches(loader(), len(parts), **options_of_loader):
            pass

    assert [len(row) for n in range(len(parts)) for row in loader().plan[n]] == [1] * len(parts)
    ways: dict[str, Callable[[], None]] = {
        "decoding": decode,
        "batches": lambda: load(threads=1, prefetch=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(options.rounds + 1):  # the first compiles and warms caches
        for name, way in ways.items():
            took = _timed(way) / len(parts)
            if round_:
                seconds[name].append(took)
    print("| one thread, no cache | ms a clip (median) | to decoding |\n| --- | --- | --- |")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["decoding"], strict=True))
        print(f"| {name} | {statistics.median(values) * 1000:.0f} | {ratio:.3f} |")

    alone = statistics.median(seconds["decoding"])
    steps = 4 * len(parts)
    print("\n| threads | workers | ms a step | waits of a busy consumer |\n| --- | --- | --- | --- |")
    for threads, workers in ((1, 0), (2, 0), (1, 1), (1, 2)):
        rate, waits = (
            _consumed(batches(loader(), steps, threads=threads, workers=workers), len(parts), busy)
            for busy in (0.0, options.busy * alone)
        )
        print(f"| {threads} | {workers} | {rate[0] * 1000:.0f} | {waits[1]:.0%} |", flush=True)


def _consumed(iterator, warm: int, busy: float) -> tuple[float, float]:
    """Seconds a step, and the share of the time spent waiting, of a consumer that is busy with each batch for so long.

    The first `warm` steps, in which processes start, are not counted.
    """
    waited, count = 0.0, 0
    began = 0.0
    for n, _ in enumerate(_timing(iterator, waits := [])):
        if n == warm:
            began, waits[:] = time.perf_counter(), []
        count += n >= warm
        time.sleep(busy)
    took = time.perf_counter() - began
    waited = sum(waits)
    return took / count, waited / took


def _timing(iterator, waits: list[float]):
    """Passes on items and writes down how long each was waited for."""
    while True:
        asked = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        waits.append(time.perf_counter() - asked)
        yield item


def _timed(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _make(path: Path, seed: int) -> Path:
    """A clip of moving test pictures with noise."""
    picture = f"testsrc2=size=1280x720:rate=30:duration=8,noise=alls=12:allf=t:all_seed={seed}"
    command = [ffmpeg_program(), "-loglevel", "error", "-f", "lavfi", "-i", picture, "-pix_fmt", "yuv420p"]
    subprocess.run([*command, "-c:v", "libx264", "-preset", "veryfast", str(path)], check=True)
    return path


if __name__ == "__main__":
    main()
