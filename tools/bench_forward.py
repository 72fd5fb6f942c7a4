"""Times the forward pass beside the reference implementation's, on the CPU, in float32.

    .venv/bin/python -m tools.bench_forward                 # what `make test` installs is needed
    .venv/bin/python -m tools.bench_forward --rounds 15 --threads 1

One process runs both on the same random weights and inputs, in turn, so that other load falls on both alike; figures
are medians over the rounds, and the ratio is the median of the ratios round by round. The largest difference between
the two outputs stands beside them: figures of a program that computes something else would mean nothing.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 8,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_heads": 6,
    "out_hidden_size": 512,
    "deepstack_visual_indexes": [1, 3, 5],
    "num_position_embeddings": 2304,
    "patch_size": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each; default: all cores")
    parser.add_argument("--pixels", type=int, default=384, help="side of the image; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="of the text prompt; default: %(default)s")
    options = parser.parse_args()
    _limit_threads(options.threads)
    pairs = _pairs(options.pixels, options.tokens)
    print(f"{options.rounds} rounds, {options.threads} threads, float32; milliseconds")
    print(f"{'':24}{'qwenvl_jax':>12}{'reference':>12}{'ratio':>8}{'difference':>13}")
    for name, (ours, reference) in pairs.items():
        difference = abs(ours() - reference()).max()  # the first call, which also compiles
        mine, theirs = _interleaved(ours, reference, options.rounds)
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        print(
            f"{name:24}{statistics.median(mine) * 1e3:12.1f}{statistics.median(theirs) * 1e3:12.1f}"
            f"{ratio:8.2f}{difference:13.1e}"
        )


def _limit_threads(count: int) -> None:
    """Gives both sides these cores, before either is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = str(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _interleaved(ours: Callable, reference: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each call; who goes first alternates."""
    seconds = {ours: [], reference: []}
    for number in range(rounds):
        for call in (ours, reference) if number % 2 else (reference, ours):
            start = time.perf_counter()
            call()
            seconds[call].append(time.perf_counter() - start)
    return seconds[ours], seconds[reference]


def _pairs(pixels: int, tokens: int) -> dict[str, tuple[Callable, Callable]]:
    """What is timed: (ours, the reference's) calls that return the same array as NumPy."""
    from tests.parity import reference  # first: it makes torchvision importable  # isort: skip
    import jax
    import numpy as np
    import torch
    from transformers import Qwen3VLConfig

    from qwenvl_jax.data.processor import Processor
    from qwenvl_jax.models.qwenvl import QwenVL
    from tests.tiny import tiny_processor_folder

    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        side = (pixels * pixels, pixels * pixels)
        ids = tiny_processor_folder(folder, image_pixels=side)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        config = Qwen3VLConfig(
            text_config=TEXT | {"vocab_size": ids["vocab_size"]},
            vision_config=VISION,
            tie_word_embeddings=True,
            **{name: ids[mark] for name, mark in zip(names, marks, strict=True)},
        )
        reference.random_model(config).save_pretrained(folder)
        theirs = reference.load_checkpoint(folder)
        theirs.set_attn_implementation("sdpa")
        model = QwenVL.from_pretrained(folder, dtype="float32")
        processor = Processor.from_pretrained(folder, dialect="transformers")

    image = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    words = "when does the red square appear in the video? " * tokens
    text = [{"role": "user", "content": processor.decode(processor.tokenizer.encode(words).ids[:tokens])}]
    question = {"type": "text", "text": "when does it appear?"}
    seen = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]

    forward = jax.jit(lambda model, batch: model(batch))
    encode = jax.jit(lambda model, batch: model.encode(batch)[0])
    batches = {"text": processor([text]), "seen": processor([seen])}
    inputs = {
        kind: reference.reference_inputs(processor.sample(asked), asked, config, processor.pixel_table)
        for kind, asked in {"text": text, "seen": seen}.items()
    }

    def pair(kind):
        return (
            lambda: np.asarray(forward(model, batches[kind]))[0, : inputs[kind]["input_ids"].shape[1]],
            lambda: theirs(**inputs[kind]).logits[0].numpy(),
        )

    def their_tower():
        return theirs.model.visual(
            inputs["seen"]["pixel_values"], grid_thw=inputs["seen"]["image_grid_thw"]
        ).pooler_output.numpy()

    patches = inputs["seen"]["pixel_values"].shape[0]
    length = inputs["text"]["input_ids"].shape[1]
    return {
        f"tower, {patches} patches": (lambda: np.asarray(encode(model, batches["seen"]))[0], their_tower),
        f"decoder, {length} tokens": pair("text"),
        "image and question": pair("seen"),
    }


if __name__ == "__main__":
    main()
