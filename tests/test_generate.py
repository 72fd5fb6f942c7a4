"""Generation: what is drawn, when an answer ends, what is streamed, and how arguments are refused."""

import dataclasses
import io
import logging
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from qwenvl_jax.data.processor import Processor
from qwenvl_jax.errors import CheckpointError, ConfigError, ConversationError, QwenVLError
from qwenvl_jax.generate import Answer, Sampling, _Writer, chat, end_token_ids, generate, pick
from qwenvl_jax.models.pretrained import load
from qwenvl_jax.parallel.mesh import make_mesh

QUESTION = [{"role": "user", "content": "describe the image"}]
LONGER = [{"role": "user", "content": "when does the red square appear and when does the blue circle leave?"}]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load(tiny_checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def answers(model, processor):
    """Greedy answers to both questions, twelve tokens each at most."""
    return generate(model, processor, [QUESTION, LONGER], max_new_tokens=12)


def with_config(model, **changes):
    """The same weights under another configuration."""
    copy = nnx.merge(*nnx.split(model))
    copy.config = dataclasses.replace(model.config, **changes)
    return copy


def test_a_row_s_answer_is_its_own(model, processor, answers):
    """Neither the other rows nor the length they pad to change an answer, greedy or drawn."""
    assert generate(model, processor, [LONGER], max_new_tokens=12) == [answers[1]]
    drawn = generate(model, processor, [QUESTION, LONGER], max_new_tokens=12, temperature=1.5, top_k=40, seed=3)
    alone = generate(model, processor, [QUESTION], max_new_tokens=12, temperature=1.5, top_k=40, seed=3)
    assert drawn[:1] == alone and drawn[0] != answers[0]
    assert drawn != generate(model, processor, [QUESTION, LONGER], 12, temperature=1.5, top_k=40, seed=4)


@pytest.mark.parametrize(("count", "shared"), [(4, True), (3, False)])
def test_on_a_mesh_conversations_and_their_frames_are_shared(
    model, tiny_checkpoint, processor, monkeypatch, count, shared
):
    """Among shares of the mesh, if these divide them; the frames of a share among its devices."""
    rng = np.random.default_rng(0)
    images = [
        {"type": "image", "image": rng.integers(0, 256, (32, 32 * (1 + i % 2), 3), dtype=np.uint8)}
        for i in range(3 * count)
    ]
    asked = [
        [{"role": "user", "content": [*images[3 * i : 3 * i + 3], {"type": "text", "text": "which?"}]}]
        for i in range(count)
    ]
    wanted = generate(model, processor, asked, max_new_tokens=5)
    spread = load(tiny_checkpoint, dtype="float32", mesh=make_mesh(jax.devices()[:4], data=2, tensor=2))
    module = sys.modules["qwenvl_jax.generate"]  # whose name is the function's too
    read, seen = module.read_prompts, []

    def reading(graph, weights, batch, *rest):
        seen.append(batch)
        return read(graph, weights, batch, *rest)

    monkeypatch.setattr(module, "read_prompts", reading)
    assert generate(spread, processor, asked, max_new_tokens=5) == wanted
    (batch,) = seen
    groups = 2 if shared else 1
    for rows in batch.vision:
        G, R = rows.patches.shape[:2]
        assert groups == G and R % 2 == 0
        assert rows.patches.sharding.shard_shape(rows.patches.shape)[:2] == (1, R // 2)
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape)[0] == (count // 2 if shared else count)


def test_answers_end(model, processor, answers):
    """At the first end token, which is not in the answer, or at the limit; each row for itself."""
    tokens = answers[0].tokens
    assert len(tokens) == 12
    end = next(token for token in tokens if token not in tokens[:2])
    stopping = with_config(model, eos_token_ids=(end,))
    first, second = generate(stopping, processor, [QUESTION, LONGER], max_new_tokens=12)
    assert first == Answer(processor.decode(tokens[: tokens.index(end)]), tokens[: tokens.index(end)])
    until = answers[1].tokens.index(end) if end in answers[1].tokens else 12
    assert second.tokens == answers[1].tokens[:until]
    assert generate(stopping, processor, [QUESTION], max_new_tokens=1)[0].tokens == tokens[:1]
    assert generate(with_config(model, eos_token_ids=(tokens[0],)), processor, [QUESTION])[0] == Answer("", [])


def test_end_tokens(model, processor):
    """Those of generation_config.json; where there are none, the tokenizer's end and padding."""
    assert end_token_ids(model, processor) == {processor.eos_token_id}
    assert end_token_ids(with_config(model, eos_token_ids=()), processor) == {
        processor.eos_token_id,
        processor.pad_token_id,
    }


def test_streamed_pieces_make_the_text(model, processor, answers):
    pieces = {0: [], 1: []}
    streamed = generate(
        model, processor, [QUESTION, LONGER], max_new_tokens=12, stream=lambda row, text: pieces[row].append(text)
    )
    assert streamed == answers
    assert ["".join(pieces[row]) for row in (0, 1)] == [answer.text for answer in answers]
    assert len(pieces[0]) > 1


def test_no_half_characters_are_streamed(processor):
    text = "naïve 漢字 🙂, then 日本 é"
    pieces = []
    writer = _Writer(processor, pieces.append)
    for token in processor.tokenizer.encode(text).ids:
        writer.add(token)
    assert writer.answer().text == "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    # an answer that stops within a character says so, as its text does
    broken = _Writer(processor, pieces.append)
    broken.add(processor.tokenizer.encode("漢").ids[0])
    assert broken.answer().text == pieces[-1] == "\ufffd"


LOGITS = np.log(np.asarray([[0.4, 0.05, 0.3, 0.2, 0.05]], np.float32))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.05, 0.3, 0.2, 0.05]),
        (Sampling(temperature=0.5), [0.16, 0.0025, 0.09, 0.04, 0.0025]),
        (Sampling(temperature=1.0, top_k=2), [0.4, 0, 0.3, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.4, 0.05, 0.3, 0.2, 0.05]),
        (Sampling(temperature=1.0, top_p=0.65), [0.4, 0, 0.3, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.75), [0.4, 0, 0.3, 0.2, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), [0.4, 0, 0.3, 0, 0]),
        (Sampling(temperature=0.0), [1, 0, 0, 0, 0]),
    ],
)
def test_how_often_each_token_is_drawn(sampling, expected):
    draws = 20_000
    logits = np.repeat(LOGITS, draws, axis=0)
    drawn = jax.jit(pick, static_argnums=3)(logits, jax.random.split(jax.random.key(0), draws), np.int32(1), sampling)
    shares = np.bincount(np.asarray(drawn), minlength=5) / draws
    expected = np.asarray(expected) / np.sum(expected)
    assert ((shares > 0) == (expected > 0)).all()
    np.testing.assert_allclose(shares, expected, atol=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a positive integer"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be"),
        ({"temperature": -1}, "temperature=-1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": "hot"}, "temperature='hot' must be"),
        ({"top_p": 0}, "top_p=0 must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1 must be"),
        ({"top_k": 0}, "top_k=0 must be a positive integer"),
        ({"top_k": 2.0}, "top_k=2.0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"conversations": QUESTION}, "put a single conversation into a list"),
        ({"conversations": "hello"}, "conversations must be a list of conversations"),
        ({"conversations": None}, "conversations must be a list of conversations"),
    ],
)
def test_bad_arguments(model, processor, arguments, message):
    with pytest.raises(QwenVLError, match=message) as caught:
        generate(model, processor, **{"conversations": [QUESTION], **arguments})
    assert "\n" not in str(caught.value)


def test_nothing_asked_nothing_answered(model, processor):
    assert generate(model, processor, []) == []


def test_processor_of_another_model(model, processor, tiny_checkpoint):
    text = dataclasses.replace(model.config.text, vocab_size=100)
    with pytest.raises(CheckpointError, match="vocab_size=100; load both from the same folder"):
        generate(with_config(model, text=text), processor, [QUESTION])
    vision = dataclasses.replace(model.config.vision, patch_size=8)
    image = {"type": "image", "image": np.zeros((64, 64, 3), np.uint8)}
    with pytest.raises(CheckpointError, match="patches of 1536 values, but the model reads 384"):
        generate(with_config(model, vision=vision), processor, [[{"role": "user", "content": [image]}]])


def test_positions_beyond_training_are_told(model, processor, caplog):
    text = dataclasses.replace(model.config.text, max_position_embeddings=20)
    with caplog.at_level(logging.WARNING, "qwenvl_jax"):
        generate(model, processor, [QUESTION], max_new_tokens=12)
        assert not caplog.records
        generate(with_config(model, text=text), processor, [QUESTION], max_new_tokens=12)
    assert "beyond the max_position_embeddings=20" in caplog.text


def test_chat_about_files(tiny_checkpoint, clip, tmp_path):
    """One streamed answer about an MP4 and a PNG, the one that `generate` gives."""
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(picture)
    out = io.StringIO()
    answer = chat(
        tiny_checkpoint, "what is it?", images=[picture], videos=[clip], max_new_tokens=6, dtype="float32", out=out
    )
    assert out.getvalue() == answer.text + "\n"
    parts = [{"type": "image", "image": str(picture)}, {"type": "video", "video": str(clip)}]
    conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]
    loaded, processor = load(tiny_checkpoint, dtype="float32"), Processor.from_pretrained(tiny_checkpoint)
    assert generate(loaded, processor, [conversation], max_new_tokens=6) == [answer]


def test_chat_refuses_before_it_loads(tiny_checkpoint, tmp_path):
    with pytest.raises(QwenVLError, match=r"nothing\.mp4"):
        chat(tiny_checkpoint, "what is it?", videos=[tmp_path / "nothing.mp4"])
    with pytest.raises(CheckpointError, match="neither a folder that exists nor a hub id"):
        chat("nosuchmodel", "what is it?")
    with pytest.raises((ConversationError, ConfigError), match="dialect"):
        chat(tiny_checkpoint, "what is it?", dialect="martian")
