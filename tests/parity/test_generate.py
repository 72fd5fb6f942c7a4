"""Greedy answers against the reference, token for token."""

import pytest
import torch

from qwenvl_jax.generate import end_token_ids, generate

pytestmark = pytest.mark.support("exact")

STEPS = 32


@pytest.fixture(scope="module")
def expected(pair):
    """The reference's greedy tokens for each conversation, alone, and how sure it was of the least sure one."""
    answers, margins = [], []
    for name in pair.conversations:
        inputs = pair.inputs(name, add_generation_prompt=True)
        made = pair.reference.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        answers.append(made.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        top = torch.topk(torch.stack(made.logits)[:, 0], 2, dim=-1).values
        margins.append(float((top[:, 0] - top[:, 1]).min()))
    return answers, margins


def test_greedy_tokens_are_identical(pair, expected):
    answers, margins = expected
    assert min(margins) > 1e-3, "a tie decides nothing; change the seed of the checkpoint"
    assert sum(len(answer) == STEPS for answer in answers) >= 3, "too many answers end early; change the seed"
    got = generate(pair.model, pair.processor, list(pair.conversations.values()), max_new_tokens=STEPS)
    ends = end_token_ids(pair.model, pair.processor)
    for name, answer, reference in zip(pair.conversations, got, answers, strict=True):
        without_end = reference[:-1] if reference[-1] in ends else reference
        assert answer.tokens == without_end, name
        assert answer.text == pair.processor.decode(without_end)
