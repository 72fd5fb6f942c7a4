"""Recipes: pre-training of Qwen3-VL from S0 to S3, each stage written as what differs from the one before, and SFT.

What the Qwen3-VL report tells (arXiv 2511.21631, section 3): what learns in each stage, its tokens, its length, and the
kinds of data. It tells no batch size, learning rate, share or cap: those are chosen here, and docs/curriculum.md says
why. The files of `configs/pretrain` and `configs/sft` are these, one run each.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from qwenvl_jax.data.mixture import MixturePart, VideoBudget
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.errors import DataError
from qwenvl_jax.presets import PRESETS
from qwenvl_jax.train.config import (
    AdapterConfig,
    DataConfig,
    GuardConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

# Where data sets lie, one folder for each part of a mixture: this variable, or `--data.root DIR`.
DATA_VARIABLE, DATA_FOLDER = "QWENVL_DATA", "data"
MODEL = "qwen3_vl_4b"
# Tokenizer and preprocessor settings, alike for every size of Qwen3-VL; `--processor` or `--model FOLDER` bring others.
PROCESSOR = "Qwen/Qwen3-VL-4B-Instruct"

# The parts of the mixtures, which are also the names of their folders, and what they count as in `modality_weights`.
MODALITIES = {
    "captions": "image",
    "ocr": "image",
    "knowledge": "image",
    "grounding": "image",
    "vqa": "image",
    "stem": "image",
    "text": "text",
    "video": "video",
    "agent": "agent",
    "long_video": "video",
    "documents": "document",
}


def s0() -> StageConfig:
    """The mergers learn to say in the decoder's words what the tower sees: 67B tokens in rows of 8,192."""
    batch = BatchShape(rows=512, length=8_192, groups=128, vision="auto")
    return StageConfig(
        "s0",
        steps=steps_for(67e9, batch),
        data=DataConfig(
            root=os.environ.get(DATA_VARIABLE, DATA_FOLDER),
            mixture=mixture(captions=6, ocr=2, knowledge=2),
            modality_weights=(("image", 1.0),),
            weigh_by="tokens",
            max_image_tokens=1_280,
            workers=8,
            threads=2,
        ),
        batch=batch,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=500, final_fraction=0.1, b2=0.95, weight_decay=0.1, clip_norm=1.0
        ),
        trainable="mergers",
        # Of decoders with experts, as in Qwen3; others have no such loss.
        router_balance=1e-3,
        guard=GuardConfig(spike=10.0, abort_after=100),
        remat="full",
    )


def s1() -> StageConfig:
    """S0, but everything learns, with more kinds of pictures, text, and a little video: 1T tokens."""
    before = s0()
    batch = dataclasses.replace(before.batch, rows=1_024, groups=256)
    return dataclasses.replace(
        before,
        name="s1",
        steps=steps_for(1e12, batch),
        data=dataclasses.replace(
            before.data,
            mixture=mixture(captions=4, ocr=2, knowledge=1, grounding=1, vqa=1, stem=1, text=1, video=1),
            modality_weights=(("image", 0.7), ("text", 0.25), ("video", 0.05)),
            max_image_tokens=2_560,
            video_budget=VideoBudget(max_frames=64, max_video_tokens=4_096, max_frame_tokens=256, min_frame_tokens=64),
        ),
        batch=batch,
        # The mergers go on at the rate that S0 ended with.
        optimizer=dataclasses.replace(
            before.optimizer,
            learning_rate=2e-5,
            rates=(("vision", 0.3), ("mergers", 5.0)),
            schedule="constant",
            warmup_steps=2_000,
        ),
        trainable="all",
    )


def s2() -> StageConfig:
    """S1, but rows of 32,768, with more text, more and longer video, and agents: 1T tokens."""
    before = s1()
    batch = dataclasses.replace(before.batch, rows=256, length=32_768, groups=128)
    return dataclasses.replace(
        before,
        name="s2",
        steps=steps_for(1e12, batch),
        data=dataclasses.replace(
            before.data,
            mixture=mixture(captions=2, ocr=2, knowledge=1, grounding=2, vqa=2, stem=3, text=1, video=1, agent=1),
            modality_weights=(("image", 0.45), ("text", 0.3), ("video", 0.2), ("agent", 0.05)),
            max_image_tokens=5_120,
            video_budget=VideoBudget(
                max_frames=256, max_video_tokens=16_384, max_frame_tokens=384, min_frame_tokens=64
            ),
            frame_rates=((1.0, 1.0), (2.0, 2.0), (4.0, 1.0)),
            hms_share=0.25,
        ),
        batch=batch,
    )


def s3() -> StageConfig:
    """S2, but rows of 262,144, for long videos and long documents, and the learning rate comes down: 100B tokens."""
    before = s2()
    batch = dataclasses.replace(before.batch, rows=32, length=262_144, groups=32)
    return dataclasses.replace(
        before,
        name="s3",
        steps=steps_for(100e9, batch),
        data=dataclasses.replace(
            before.data,
            mixture=mixture(vqa=1, stem=1, text=1, video=1, long_video=3, agent=1, documents=1),
            modality_weights=(("image", 0.1), ("text", 0.25), ("video", 0.4), ("agent", 0.05), ("document", 0.2)),
            # As the report's evaluations: up to 2,048 frames and 224K tokens of a video, up to 768 of a frame.
            video_budget=VideoBudget(
                max_frames=2_048, max_video_tokens=229_376, max_frame_tokens=768, min_frame_tokens=32
            ),
            frame_rates=((0.5, 1.0), (1.0, 1.0), (2.0, 1.0)),
        ),
        batch=batch,
        optimizer=dataclasses.replace(
            before.optimizer, schedule="wsd", decay_fraction=1.0, decay_shape="sqrt", warmup_steps=200
        ),
    )


def curriculum() -> tuple[StageConfig, ...]:
    """S0 to S3; from S1 on the optimizer's moments go on too, since the same weights learn."""
    return (s0(), s1(), *(dataclasses.replace(stage, carry_optimizer=True) for stage in (s2(), s3())))


def sft(name: str = "sft") -> StageConfig:
    """Supervised fine-tuning in rows of 32,768, a third of it text: tower frozen, as in Qwen's own scripts."""
    before = s2()
    batch = BatchShape(rows=64, length=32_768, groups=64, vision="auto")
    steps = steps_for(4e9, batch)
    return dataclasses.replace(
        before,
        name=name,
        steps=steps,
        data=dataclasses.replace(
            before.data,
            mixture=(
                MixturePart("sft_image", "sft_image", weight=2.0, modality="image"),
                MixturePart("sft_video", "sft_video", weight=1.0, modality="video"),
                MixturePart("sft_text", "sft_text", weight=1.0, modality="text"),
            ),
            modality_weights=(("image", 0.5), ("video", 1 / 6), ("text", 1 / 3)),
            weigh_by="samples",
        ),
        batch=batch,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=round(0.03 * steps), clip_norm=1.0),
        trainable=r"^(merger|deepstack|text)\.",
    )


def sft_long(name: str = "sft_long") -> StageConfig:
    """SFT, but rows of 262,144, the lengths mixed, with the caps of S3."""
    before, long = sft(name), s3()
    batch = dataclasses.replace(before.batch, rows=8, length=262_144, groups=8)
    steps = steps_for(1e9, batch)
    parts = (
        *before.data.mixture,
        MixturePart("sft_long_video", "sft_long_video", modality="video"),
        MixturePart("sft_documents", "sft_documents", modality="document"),
    )
    return dataclasses.replace(
        before,
        steps=steps,
        data=dataclasses.replace(
            before.data,
            mixture=parts,
            modality_weights=(("image", 0.3), ("video", 0.25), ("text", 0.3), ("document", 0.15)),
            video_budget=long.data.video_budget,
            frame_rates=long.data.frame_rates,
        ),
        batch=batch,
        optimizer=dataclasses.replace(before.optimizer, warmup_steps=round(0.03 * steps)),
    )


def with_lora(config: TrainConfig) -> TrainConfig:
    """The run with low-rank adapters on the decoder, which learn at ten times the rate, in place of its weights."""

    def faster(stage: StageConfig) -> StageConfig:
        optimizer = dataclasses.replace(stage.optimizer, learning_rate=10 * stage.optimizer.learning_rate)
        return dataclasses.replace(stage, optimizer=optimizer, trainable="all")

    stages = tuple(map(faster, config.stages))
    return dataclasses.replace(config, stages=stages, adapter=AdapterConfig(rank=64, alpha=64.0))


def own_data() -> StageConfig:
    """Fine-tuning on data of one's own, small: the settings of Qwen's own scripts, in rows of 8,192."""
    before = sft("own")
    return dataclasses.replace(
        before,
        steps=200,
        data=DataConfig(
            mixture=(MixturePart("own", "own"),),
            max_image_tokens=1_280,
            video_budget=VideoBudget(max_frames=128, max_video_tokens=6_144, min_frame_tokens=16),
            threads=2,
        ),
        batch=BatchShape(rows=8, length=8_192, groups=8, vision="auto"),
        optimizer=dataclasses.replace(before.optimizer, warmup_steps=6),
        guard=GuardConfig(),
    )


def pretraining(*stages: StageConfig) -> TrainConfig:
    """A run of these stages over a Qwen3-VL of 4B, in bf16 with weights and moments in f32.

    `--model NAME` is another size, `--init DIR` its first weights: an assembled model for S0, the model of the stage
    before for others. Without weights a run begins with random ones, and says so.
    """
    return TrainConfig(
        model=PRESETS[MODEL],
        processor=PROCESSOR,
        stages=stages,
        dtype="bfloat16",
        checkpoint_every=500,
        keep_checkpoints=3,
    )


def fine_tuning(*stages: StageConfig) -> TrainConfig:
    """A run of these stages from the weights of a released model, with its processor; `--model` names another."""
    return dataclasses.replace(pretraining(*stages), model=PROCESSOR, processor=None, checkpoint_every=100)


def mixture(**weights: float) -> tuple[MixturePart, ...]:
    """Parts of `MODALITIES` by name, with their weights within their modality; each lies in a folder of its name."""
    return tuple(
        MixturePart(name, name, weight=float(weight), modality=MODALITIES[name]) for name, weight in weights.items()
    )


def steps_for(tokens: float, batch: BatchShape) -> int:
    """Steps whose token slots are as many as `tokens`, at least one."""
    return max(round(tokens / (batch.rows * batch.length)), 1)


def check_data(config: TrainConfig) -> None:
    """Refuses a run of which a data set is missing, before anything is fetched or measured.

    Raises:
      DataError: names all that are missing, and what makes them.
    """
    paths = list(dict.fromkeys(path for stage in config.stages for path in _paths(stage)))
    remote = [path for path in paths if "://" in path]
    if remote:
        raise DataError(
            f"data sets are read as files, so {remote[0]} cannot be one; mount the bucket (gcsfuse, s3fs) and give the "
            f"folder where it is mounted as --data.root or {DATA_VARIABLE}."
        )
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} data sets are missing: {', '.join(missing)}; make each with `qwenvl-jax "
            "data build RECORDS.jsonl FOLDER --model MODEL` (docs/curriculum.md says what it holds), or say where they "
            f"lie with --data.root or {DATA_VARIABLE}, or where one does with --data.mixture.NAME.source."
        )


def _paths(stage: StageConfig) -> Iterable[str]:
    for part in (*stage.data.parts, *map(stage.data.in_root, stage.validation.data)):
        several = part.source if isinstance(part.source, tuple) else (part.source,)
        yield from (os.fspath(path) for path in several if isinstance(path, str | os.PathLike))
