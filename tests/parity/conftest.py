"""One tiny checkpoint of each shape, whole with tokenizer and processor, loaded here and by the reference."""

import dataclasses
from pathlib import Path

import pytest

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.models import pretrained
from qwenvl_jax.models.qwenvl import QwenVL
from tests.parity import reference
from tests.tiny import tiny_processor_folder


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same folder, read here and by the reference."""

    shape: str
    folder: Path
    model: QwenVL
    processor: Processor
    reference: reference.Qwen3VLForConditionalGeneration

    def inputs(self, sample):
        """The reference's inputs for a sample."""
        return reference.reference_inputs(sample, self.reference.config)


@pytest.fixture(scope="session", params=list(reference.SHAPES))
def pair(request, tmp_path_factory) -> Pair:
    """A tied and an untied checkpoint, in float32, with the dialect of the reference."""
    folder = tmp_path_factory.mktemp(request.param)
    ids = tiny_processor_folder(folder)
    reference.write_checkpoint(
        folder,
        request.param,
        vocab_size=ids["vocab_size"] + 3,  # rows that no token uses, as the public checkpoints have
        ids={
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        },
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
    )
    return Pair(
        shape=request.param,
        folder=folder,
        model=pretrained.load(folder, dtype="float32"),
        processor=Processor.from_pretrained(folder, dialect="transformers"),
        reference=reference.load_checkpoint(folder),
    )
