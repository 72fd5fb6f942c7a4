"""The demo's tokenizer and processor folder."""

import pytest

from qwenvl_jax.demo import vocabulary
from qwenvl_jax.demo.clips import COLOURS, HELD_OUT, SHAPES
from qwenvl_jax.demo.records import answer, question


def test_the_tokenizer_is_the_same_every_time_and_small():
    tokenizer = vocabulary.build_tokenizer()
    assert tokenizer.to_str() == vocabulary.build_tokenizer().to_str()
    assert tokenizer.get_vocab_size() <= 640


def test_words_keys_and_times_of_the_task_are_single_tokens():
    tokenizer = vocabulary.build_tokenizer()

    def pieces(text):
        return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(text).ids]

    assert pieces("<12.3 seconds>") == ["<", "12.3", " seconds>"]
    assert all(len(pieces(f"{tenths / 10:.1f}")) == 1 for tenths in range(200))
    assert pieces("3.14 25") == ["3", ".", "1", "4", " ", "2", "5"]
    for name in HELD_OUT.items():
        assert pieces(question(" ".join(name))) == ["When", " does", " the", f" {name[0]}", f" {name[1]}", " appear?"]
    expected = ['{"event": "', "red", " ring", '", "start": ', "3.4", ', "end": ', "10.5", "}"]
    assert pieces(answer("red ring", 3.4, 10.5)) == expected
    assert all(len(pieces(f" {word}")) == 1 for word in (*COLOURS, *SHAPES))


def test_any_text_survives():
    tokenizer = vocabulary.build_tokenizer()
    for text in ("naïve 数学 text\n\t 12,345", "<|im_start|>user\nWhen?<|im_end|>\n", "  a  b "):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.reference
def test_transformers_loads_the_folder(tmp_path):
    from tests.parity.reference import transformers

    processor = transformers.AutoProcessor.from_pretrained(vocabulary.write_processor_folder(tmp_path))
    messages = [
        {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "When?"}]},
        {"role": "assistant", "content": "Now."},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>When?<|im_end|>\n"
        "<|im_start|>assistant\nNow.<|im_end|>\n"
    )
    assert processor.tokenizer(text).input_ids == vocabulary.build_tokenizer().encode(text).ids
    assert type(processor.video_processor).__name__ == "Qwen3VLVideoProcessor"
    assert (processor.video_processor.fps, processor.video_processor.patch_size) == (vocabulary.SAMPLED_FPS, 16)
    assert processor.tokenizer.eos_token == "<|im_end|>" and processor.tokenizer.pad_token == "<|endoftext|>"
