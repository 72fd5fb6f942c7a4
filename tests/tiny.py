"""A tiny processor folder in the public layout: a byte-level BPE, a chat template and the preprocessor files.

Everything is made here, from nothing, so that tests need no download. The pieces have the form of the public folders of
each generation; only the sizes differ.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = (
    "user assistant system user assistant system seconds seconds seconds seconds",
    "when does the red square appear and when does the blue circle leave the picture",
    "the red square appears at three seconds and leaves at five seconds",
    "describe the image describe the video what happens in the video what is in the image",
    "a green triangle moves to the left, then a yellow disc moves to the right",
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


# The templates of Qwen2-VL and Qwen2.5-VL say the system's words where a conversation does not.
DEFAULT_SYSTEM_TEMPLATE = (
    """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
"""
    + CHAT_TEMPLATE
)

PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of fewer than 400 tokens; the special tokens of Qwen stand last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def tiny_processor_folder(
    folder: str | Path,
    *,
    model_type: str = "qwen3_vl",
    older_files: bool = False,
    patch_size: int | None = None,
    image_pixels: tuple[int, int] = (4096, 65536),
    video_pixels: tuple[int, int] | None = None,
) -> dict[str, int]:
    """Writes tokenizer, chat template and preprocessor files of a tiny model into `folder`.

    Args:
      folder: made if it is not there; other files in it are left alone.
      model_type: one of `PROCESSORS`.
      older_files: whether bounds are called min_pixels and max_pixels and the template stands in chat_template.json, as
        in the first folders of Qwen2-VL and Qwen2.5-VL.
      patch_size: side of a patch in pixels; frames become multiples of twice this. 16 for Qwen3-VL, else 14.
      image_pixels: smallest and largest number of pixels of an image.
      video_pixels: the same of a whole clip of Qwen3-VL (4096 and 262144 without it), of a frame of a video of the
        others; these have a file for videos only if it is given.

    Returns:
      The id of each special token by its text, and `vocab_size`, one more than the highest id.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    third = model_type.startswith("qwen3")
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": PROCESSORS[model_type],
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 262144,
        "split_special_tokens": False,
    }
    patches = {
        "patch_size": patch_size or (16 if third else 14),
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5] if third else CLIP_MEAN,
        "image_std": [0.5, 0.5, 0.5] if third else CLIP_STD,
        "processor_class": PROCESSORS[model_type],
    }

    def bounds(low: int, high: int) -> dict:
        if older_files:
            return {"min_pixels": low, "max_pixels": high}
        return {"size": {"shortest_edge": low, "longest_edge": high}}

    files = {
        "tokenizer_config.json": tokenizer_config,
        "preprocessor_config.json": {
            **bounds(*image_pixels),
            "image_processor_type": f"Qwen2VLImageProcessor{'' if older_files else 'Fast'}",
            **patches,
        },
    }
    if third or video_pixels:
        files["video_preprocessor_config.json"] = {
            **bounds(*(video_pixels or (4096, 262144))),
            "video_processor_type": "Qwen3VLVideoProcessor" if third else "Qwen2VLVideoProcessor",
            **patches,
        }
    template = CHAT_TEMPLATE if third else DEFAULT_SYSTEM_TEMPLATE
    if older_files:
        files["chat_template.json"] = {"chat_template": template}
    else:
        (folder / "chat_template.jinja").write_text(template)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    return {**ids, "vocab_size": tokenizer.get_vocab_size()}
