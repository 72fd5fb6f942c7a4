"""The demo's processor folder in the public layout: a small BPE of its own, a chat template, size limits of frames.

The vocabulary holds all bytes, so that any text can be written. Each word of the task is one token, and so are the
keys of the answer with their punctuation and every time up to 20 seconds: a time is copied in one step, and the event's
name stands right before the first time. transformers loads the folder as well.
"""

import json
import os
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwenvl_jax.demo.clips import COLOURS, SHAPES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Sampled frames a second when a conversation does not say; two sampled frames make one temporal patch.
SAMPLED_FPS = 4.0

# A key takes all punctuation around it; a word the space before it and one mark behind it (" seconds>", " appear?"); a
# time with one decimal is whole; any other digit stands alone.
_SPLIT = (
    r'[^\p{L}\p{N}]*"(?:event|start|end)": "?|'
    r" ?\p{L}+[>?\n]?|"
    r"\p{N}+\.\p{N}(?!\p{N})|\p{N}|"
    r"[^\p{L}\p{N}]+"
)

_KEYS = ('{"event": "', '", "start": ', ', "end": ')
_MARKS = ('{"', '": "', '", "', '": ', ', "', ". ", ", ")
_TIMES = tuple(f"{tenths / 10:.1f}" for tenths in range(200))
_WORDS = (
    *("system\n", "user\n", "assistant\n", " seconds>", "When", " does", " the", " appear?", " leave?"),
    *("nothing", " nothing"),
    *(f" {word}" for word in (*COLOURS, *SHAPES)),
    *COLOURS,
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
_LEVELS = {
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
}


def build_tokenizer() -> Tokenizer:
    """The byte-level BPE of the demo: 256 bytes, the merges that make each word of the task one token, special tokens.

    The same on every run: the words are few, each is given the same number of times, and the trainer goes on until
    every one of them is whole.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((*_WORDS, *_TIMES, *_KEYS, *_MARKS), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_processor_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Writes tokenizer, preprocessor settings and chat template into `folder`, made if missing, and returns it.

    Each file whole or not at all, so that another process that does the same may be reading them.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    settings = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen3VLProcessor",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            # Pixels of one image: 4 to 64 merged tokens.
            "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
            **_PATCHES,
            **_LEVELS,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "processor_class": "Qwen3VLProcessor",
            # Pixels of a whole video: the demo's clips (16 to 48 frames of 64 x 64 to 96 x 64) pass as they are.
            "size": {"shortest_edge": 4 * 64 * 64, "longest_edge": 96 * 96 * 64},
            "fps": SAMPLED_FPS,
            "min_frames": 4,
            "max_frames": 96,
            "do_sample_frames": True,
            "cap_pixels_per_frame": False,
            **_PATCHES,
            **_LEVELS,
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        },
    }
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in settings.items()}
    texts |= {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE}
    for name, text in texts.items():
        unfinished = folder / f".{name}.{os.getpid()}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
    return folder
