"""bfloat16: no further from the reference's float32 than the reference's own bfloat16 is, by half again."""

import jax
import numpy as np
import pytest
import torch

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.models import pretrained
from tests.parity import reference
from tests.parity.conversations import CONVERSATIONS, EVEN_CONVERSATIONS
from tests.tiny import tiny_processor_folder

SEEDS = 5
# Of the experts that a token goes to, the last one's logit is ahead of the next one's by at least this much.
APART = 0.15
TEXT = [{"role": "user", "content": "what is red and what leaves?"}]


def random_model(folder, shape: str, ids: dict, seed: int):
    """A random checkpoint in `folder`, and the model; the routers' experts lie along one line, far apart."""
    model = reference.write_checkpoint(
        folder,
        shape,
        seed=seed,
        vocab_size=ids["vocab_size"] + 3,
        ids={
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        },
    )
    routers = [weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
    with torch.no_grad():
        for weight in routers:
            weight.copy_(torch.outer(torch.tensor([1.5, 1.3, 1.1, 0.2, -1.1, -1.3, -1.5]), 4 * weight[0]))
    if routers:
        model.save_pretrained(folder)
    return model


def closest_choice(model, inputs) -> float:
    """How little decided between being sent to an expert and not, over all tokens and layers."""
    gaps = [torch.inf]

    def note(_module, _inputs, outputs):
        ordered = outputs[0].sort(dim=-1, descending=True).values
        gaps.append(float((ordered[:, 2] - ordered[:, 3]).min()))

    hooks = [m.register_forward_hook(note) for name, m in model.named_modules() if name.endswith("mlp.gate")]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return min(gaps)


@pytest.mark.parametrize("shape", ["qwen2 untied", "qwen2.5 untied", "qwen3 untied", "qwen3 moe untied"])
def test_no_further_from_float32_than_the_reference(shape, tmp_path):
    model_type = reference.SHAPES[shape][0]
    ids = tiny_processor_folder(tmp_path, model_type=model_type)
    conversation = (EVEN_CONVERSATIONS if model_type == "qwen2_5_vl" else CONVERSATIONS)["images"]
    conversation = TEXT if model_type == "qwen3_vl_moe" else conversation
    logits = jax.jit(lambda model, batch: model(batch))
    ratios = []
    for seed in range(40):
        random_model(tmp_path, shape, ids, seed)
        processor = Processor.from_pretrained(tmp_path, dialect="transformers")
        exact = reference.load_checkpoint(tmp_path)
        sample = processor.sample(conversation)
        inputs = reference.reference_inputs(sample, conversation, exact.config, processor.pixel_table)
        if closest_choice(exact, inputs) < APART:
            continue
        with torch.no_grad():
            expected = exact(**inputs).logits[0].numpy()
            half = exact.to(torch.bfloat16)(**inputs).logits[0].float().numpy()
        batch = processor([conversation])
        ours = np.asarray(logits(pretrained.load(tmp_path, dtype="bfloat16"), batch))[0]
        ratios.append(np.abs(ours - expected).max() / np.abs(half - expected).max())
        if len(ratios) == SEEDS:
            break
    assert len(ratios) == SEEDS, "too few seeds whose experts lie apart"
    assert np.median(ratios) <= 1.5, ratios
