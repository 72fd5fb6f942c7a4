"""The demo's model and its curriculum: a text warm-up, then S0 to S3 on clips, as one run.

The warm-up stands in for the pretrained language model that S0 presupposes: the same questions and answers, with the
clips told in words, as a course of lessons (`demo.warmup`). S0 then moves only the mergers, which learn to say in the
decoder's words what the (still random) tower sees; from S1 on everything learns, on clips of up to 9, then 10.5, then
12 seconds, short ones and some text in every stage.

    text  |warm-up, words in place of pixels|
    s0                                      |mergers|
    s1                                              |all, to 9 s |
    s2                                                           |all, to 10.5 s |
    s3                                                                           |all, to 12 s        |
"""

import fcntl
import pathlib
from collections.abc import Sequence

from tokenizers import Tokenizer

from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
from qwenvl_jax.data.packing import BatchShape
from qwenvl_jax.data.processor import Processor
from qwenvl_jax.demo.clips import Clip, make_clips
from qwenvl_jax.demo.records import training_conversations, write_records
from qwenvl_jax.demo.vocabulary import write_processor_folder
from qwenvl_jax.demo.warmup import course, text_conversation
from qwenvl_jax.train.config import DataConfig, MeshConfig, OptimizerConfig, StageConfig, TrainConfig

# Where the single stages of `configs/demo` find their data, made there on first use.
DATA = pathlib.Path("runs/demo-stages/data")
LONGEST = {"s1": 9.0, "s2": 10.5, "s3": 12.0}
# Conversations in words among those about clips, from S1 on.
TOLD_SHARE = 0.15
ROWS, LENGTH = 4, 512
ABOUT = {
    "text": "warm-up: clips told in words, everything learns",
    "s0": "mergers alone, clips up to 9 s",
    "s1": "everything, clips up to 9 s",
    "s2": "everything, clips up to 10.5 s",
    "s3": "everything, clips up to 12 s",
}
# Steps of each stage: in the demo of a few minutes, and in the one that makes the model that ships.
QUICK_STEPS = {"text": 250, "s0": 12, "s1": 70, "s2": 35, "s3": 50}
FULL_STEPS = {"text": 1900, "s0": 100, "s1": 500, "s2": 300, "s3": 500}
PEAK_RATE = {"text": 0.02, "s0": 0.02, "s1": 0.015, "s2": 0.012, "s3": 0.012}


def train_clips(full: bool) -> int:
    """How many training clips are made."""
    return 3000 if full else 300


def tiny_config(processor: Processor) -> QwenVLConfig:
    """A Qwen3-VL of 1.3 million parameters with the tokenizer of the demo: every part of the real one, small."""
    # Rounded up, so that the embedding splits over devices.
    entries = -(-processor.tokenizer.get_vocab_size() // 64) * 64
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=entries,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope=RopeConfig(theta=10_000.0, mrope_section=(6, 5, 5)),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        ),
        vision=VisionConfig(
            depth=3,
            hidden_size=64,
            intermediate_size=192,
            num_heads=4,
            out_hidden_size=128,
            deepstack_visual_indexes=(0, 1),
            num_position_embeddings=64,
        ),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
    )


def write_data(
    folder: pathlib.Path, clips: Sequence[tuple[pathlib.Path, Clip]], seed: int, text_steps: int, passes: int = 1
) -> None:
    """Writes the processor folder and what each stage reads: the course in words, the clips in `passes` orders each."""
    tokenizer = Tokenizer.from_file(str(write_processor_folder(folder / "processor") / "tokenizer.json"))

    def count_tokens(messages: list[dict]) -> int:
        # The marks of a turn: <|im_start|>, the role, <|im_end|>, the line break.
        return sum(4 + len(tokenizer.encode(message["content"]).ids) for message in messages)

    lessons = course(seed, text_steps * ROWS * LENGTH, count_tokens)
    write_records(folder / "text.jsonl", ((f"text-{i}", messages) for i, messages in enumerate(lessons)))
    for stage, longest in LONGEST.items():
        shown = list(training_conversations(clips, seed, passes, longest))
        # Numbers that the course did not use.
        told = ((f"told-{i}", text_conversation(seed, 10**6 + i)) for i in range(int(TOLD_SHARE * len(shown))))
        write_records(folder / f"{stage}.jsonl", shown)
        write_records(folder / f"{stage}-told.jsonl", told)


def stage(name: str, steps: int, folder: pathlib.Path = DATA) -> StageConfig:
    """One stage over the data in `folder`."""
    # A row of clips has up to one and a half patches for every token, in frames of 16 or 24 patches: vision rows of 48
    # hold either without a gap.
    vision = () if name == "text" else ((ROWS * LENGTH * 3 // 2 // 48, 48),)
    files = {"text": ["text"], "s0": ["s1"]}.get(name, [name, f"{name}-told"])
    sources = [str(folder / f"{file}.jsonl") for file in files]
    return StageConfig(
        name=name,
        steps=steps,
        # The lessons of the course stand in their order.
        data=DataConfig(
            source=sources if len(sources) > 1 else sources[0],
            shuffle=name != "text",
            # Short lessons need more to choose from than four a row, or rows stay half empty.
            window=64 if name == "text" else 0,
            cache_bytes=3 << 30,
        ),
        batch=BatchShape(rows=ROWS, length=LENGTH, vision=vision),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=PEAK_RATE[name],
            adam_learning_rate=0.15 * PEAK_RATE[name],
            warmup_steps=min(50, steps // 10),
            final_fraction=0.03,
        ),
        trainable="mergers" if name == "s0" else "all",
        loss="token",
        unroll=True,
    )


def run_config(stages: Sequence[StageConfig], folder: pathlib.Path, seed: int = 0) -> TrainConfig:
    """A run of these stages from random weights; its checkpoints keep the end of every stage."""
    processor = Processor.from_pretrained(write_processor_folder(folder / "processor"))
    return TrainConfig(
        model=tiny_config(processor),
        stages=tuple(stages),
        processor=str(folder / "processor"),
        seed=seed,
        checkpoint_every=max(sum(stage.steps for stage in stages) // 20, 5),
        keep_checkpoints=100,
        mesh=MeshConfig(fsdp=1),
    )


def prepare(
    out: pathlib.Path, clips: Sequence[tuple[pathlib.Path, Clip]], *, full: bool = False, seed: int = 0
) -> TrainConfig:
    """Writes what the demo's run reads into `out`/data, and returns its settings."""
    folder, steps = out / "data", FULL_STEPS if full else QUICK_STEPS
    write_data(folder, clips, seed, steps["text"])
    return run_config([stage(name, count, folder) for name, count in steps.items()], folder, seed)


def single_stage(name: str) -> TrainConfig:
    """A run of one stage, as `configs/demo` has it, over data that `prepare_single` makes."""
    return run_config([stage(name, QUICK_STEPS[name])], DATA)


def whole_curriculum() -> TrainConfig:
    """A run of all stages over the same data."""
    return run_config([stage(name, steps) for name, steps in QUICK_STEPS.items()], DATA)


def prepare_single(config: TrainConfig) -> None:
    """Makes the clips and records that `configs/demo` reads, if they are missing and the config still reads them.

    Of several processes on a machine one makes them, for which the others wait.
    """
    own = {str(DATA / f"{name}.jsonl") for name in ("text", *LONGEST, *(f"{name}-told" for name in LONGEST))}
    wanted = {
        path
        for stage in config.stages
        for path in ([stage.data.source] if isinstance(stage.data.source, str) else stage.data.source)
        if isinstance(path, str)
    }

    def missing() -> bool:
        return any(path in own and not pathlib.Path(path).exists() for path in wanted)

    if missing():
        DATA.mkdir(parents=True, exist_ok=True)
        with (DATA / ".making").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if missing():
                clips = make_clips(DATA.parent / "clips", "train", train_clips(full=False), 0)
                write_data(DATA, clips, 0, QUICK_STEPS["text"])
