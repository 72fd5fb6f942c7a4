"""One tiny checkpoint of each shape, whole with tokenizer and processor, loaded here and by the reference."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.models import pretrained
from qwenvl_jax.models.qwenvl import QwenVL
from tests.parity import reference
from tests.parity.conversations import CONVERSATIONS, EVEN_CONVERSATIONS
from tests.tiny import tiny_processor_folder


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same folder, read here and by the reference."""

    shape: str
    folder: Path
    model: QwenVL
    processor: Processor
    reference: torch.nn.Module

    @property
    def conversations(self) -> dict[str, list[dict]]:
        """The conversations of every kind, by name."""
        return EVEN_CONVERSATIONS if self.model.config.model_type == "qwen2_5_vl" else CONVERSATIONS

    def sample(self, name: str, add_generation_prompt: bool = False):
        """Our sample of a conversation."""
        return self.processor.sample(self.conversations[name], add_generation_prompt)

    def inputs(self, name: str, add_generation_prompt: bool = False):
        """The reference's inputs for a conversation."""
        sample = self.sample(name, add_generation_prompt)
        table = self.processor.pixel_table
        return reference.reference_inputs(sample, self.conversations[name], self.reference.config, table)


def _shapes() -> list:
    """Every shape, the longer suite's as such."""
    return shapes([name for name in reference.SHAPES if name not in reference.SLOW_SHAPES], reference.SLOW_SHAPES)


def shapes(fast: Collection[str], slow: Collection[str]) -> list:
    """Shapes as parameters of `pair`, marked with their generation, and for one worker, which makes each once."""
    params = []
    for name, (model_type, *_) in reference.SHAPES.items():
        if name not in fast and name not in slow:
            continue
        marks = [pytest.mark.support(model_type=model_type, yarn=name.endswith("yarn")), pytest.mark.xdist_group(name)]
        marks += [pytest.mark.slow] if name in slow else []
        params.append(pytest.param(name, marks=marks))
    return params


@pytest.fixture(scope="session", params=_shapes(), ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory) -> Pair:
    """A checkpoint of each generation, tied and untied, with and without YaRN, in float32; the reference's dialect."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    ids = tiny_processor_folder(folder, model_type=reference.SHAPES[request.param][0])
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
