"""A small mixture with everything that makes batches differ: text, images, real MP4s at drawn rates, a damaged file."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.data.mixture import MixturePart, VideoBudget
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.train.config import DataConfig, TrainConfig
from tests.train.tiny_run import tiny_config, write_records, write_tiny_run


def write_mixed(folder: Path, clip: Path) -> None:
    """Writes the data of `mixed_config` into a folder: 16 texts, 8 pictures, 12 videos of which one is scrambled."""
    write_tiny_run(folder, clip)
    rng = np.random.default_rng(0)
    whole = clip.read_bytes()
    at = whole.index(b"mdat") + 204
    (folder / "scrambled.mp4").write_bytes(whole[:at] + rng.bytes(600) + whole[at + 600 :])
    pictures = []
    for n in range(8):
        height, width = rng.integers(40, 120, 2).tolist()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{n}.png")
        pictures.append(_record(f"picture-{n}", {"type": "image", "image": f"{n}.png"}))
    write_records(folder / "pictures.jsonl", pictures)
    write_records(folder / "text.jsonl", [_record(f"text-{n}", question="red " * (5 * n)) for n in range(16)])
    videos = ["scrambled.mp4" if n == 3 else "clip.mp4" for n in range(12)]
    clips = [_record(f"clip-{n}", {"type": "video", "video": video}) for n, video in enumerate(videos)]
    write_records(folder / "clips.jsonl", clips)


def mixed_config(folder: str | Path, **data) -> TrainConfig:
    """One stage of twelve steps over the mixture: 16 rows in 16 groups."""
    folder = Path(folder)
    parts = (
        MixturePart("text", str(folder / "text.jsonl"), weight=2.0, final_weight=1.0),
        MixturePart("pictures", str(folder / "pictures.jsonl"), max_epochs=6),
        MixturePart("clips", str(folder / "clips.jsonl"), weight=1.5),
    )
    settings = DataConfig(
        mixture=parts,
        frame_rates=((2.0, 1.0), (4.0, 2.0), (8.0, 1.0)),
        video_budget=VideoBudget(max_video_tokens=36, min_frame_tokens=4),
        hms_share=0.5,
        max_failed=0.2,
    )
    config = tiny_config(folder)
    stage = dataclasses.replace(
        config.stages[1],
        steps=12,
        data=dataclasses.replace(settings, **data),
        batch=BatchShape(rows=16, length=192, groups=16, vision=((4, 64),)),
    )
    return dataclasses.replace(config, stages=(stage,))


def _record(name: str, *parts, question: str = "what leaves?") -> dict:
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"id": name, "messages": [user, {"role": "assistant", "content": f"a red square {name}"}]}


def read_lines(text: str) -> list[dict]:
    """Lines of JSON."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
