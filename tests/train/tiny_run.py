"""A tiny run over one MP4 clip and some text: a folder with its data and a config file, and ways to start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.train.config import DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig
from tests import compiling
from tests.tiny import tiny_processor_folder

ROOT = Path(__file__).parents[2]

CONFIG = """\
from tests.train.tiny_run import tiny_config


def get_config():
    return tiny_config({folder!r})
"""


def write_tiny_run(folder: Path, clip: Path) -> Path:
    """Writes a processor folder, a copy of the clip, its records and `config.py` into `folder`; returns the config."""
    tiny_processor_folder(folder / "processor")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    video = {"type": "video", "video": "clip.mp4", "fps": 2.0}
    records = [
        {
            "id": f"clip-{i}",
            "messages": [
                {"role": "user", "content": [video, {"type": "text", "text": f"when does the {colour} circle leave?"}]},
                {"role": "assistant", "content": f"at {i} seconds"},
            ],
        }
        for i, colour in enumerate(("red", "blue", "green"))
    ]
    records.append(
        {
            "id": "text",
            "messages": [{"role": "user", "content": "describe"}, {"role": "assistant", "content": "a red square"}],
        }
    )
    write_records(folder / "data.jsonl", records)
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    return folder / "config.py"


def write_records(path: Path, records: list[dict]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tiny_model(processor: Processor) -> QwenVLConfig:
    """A model of a few thousand weights with all its parts, for the ids of this processor."""
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=processor.tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rope=RopeConfig(theta=10_000.0, mrope_section=(4, 2, 2)),
            tie_word_embeddings=True,
        ),
        vision=VisionConfig(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            deepstack_visual_indexes=(0,),
            num_position_embeddings=16,
        ),
        **{name: getattr(processor, name) for name in ids},
    )


def tiny_config(folder: str | Path) -> TrainConfig:
    """Two stages over the data of `write_tiny_run`: three steps for the mergers alone, five for everything."""
    folder = Path(folder)
    data = DataConfig(source=str(folder / "data.jsonl"))
    batch = BatchShape(rows=2, length=160, vision=((8, 24),))
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=1)
    stage = StageConfig(name="s0", steps=3, data=data, batch=batch, optimizer=optimizer, trainable="mergers")
    return TrainConfig(
        model=tiny_model(Processor.from_pretrained(folder / "processor")),
        stages=(stage, StageConfig(name="s1", steps=5, data=data, batch=batch, optimizer=optimizer)),
        processor=str(folder / "processor"),
        checkpoint_every=2,
        mesh=MeshConfig(fsdp=1),
    )


def command_line(*arguments: object) -> subprocess.CompletedProcess:
    """Runs `qwenvl-jax` with these arguments, in a process that sees one device."""
    return _process("-m", "qwenvl_jax", *arguments)


def killed(moment: str, config: Path, out: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs the `train` command in a process that sends itself a signal at `moment`; see `tests.train.killed`."""
    return _process("-m", "tests.train.killed", moment, config, "--out", out, *arguments)


def environment(**more: str) -> dict[str, str]:
    """For a process with one CPU device.

    Programs that run for a few steps are not worth optimizing, and are compiled once for all tests; those of several
    processes, which take no program from a cache, anew each time.
    """
    given = {"XLA_FLAGS": compiling.quickly(), "JAX_PLATFORMS": "cpu"}
    cache = os.environ["TESTS_COMPILATION_CACHE"]
    given |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **given, **more}


def _process(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
