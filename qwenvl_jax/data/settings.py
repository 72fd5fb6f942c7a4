"""What a model's folder says about text and pixels: tokenizer, chat template, and the preprocessor files.

Folders of Qwen3-VL have two of those, `preprocessor_config.json` for images and `video_preprocessor_config.json`. Those
of Qwen2-VL and Qwen2.5-VL have the first alone, for both. Folders that transformers 5 saved have
`processor_config.json` in place of either. Of config.json only what the way to a batch depends on is read.
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qwenvl_jax.checkpoint.sections import Section
from qwenvl_jax.data.generations import Generation, find_generation
from qwenvl_jax.data.image import first_line, pixel_table
from qwenvl_jax.errors import CheckpointError, ConfigError

DIALECTS = ("official", "transformers")
DIALECT_FILE = "qwenvl_jax.json"

# For a config.json that leaves them out: the defaults of transformers' Qwen2.5-VL configuration.
_VISION_DEFAULTS = {"tokens_per_second": 4, "window_size": 112, "patch_size": 14, "spatial_merge_size": 2}
# For a folder without config.json: what every public Qwen2.5-VL says.
_VISION_PUBLIC = {**_VISION_DEFAULTS, "tokens_per_second": 2}


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """How images, or videos, are sized and cut; from `preprocessor_config.json` or `video_preprocessor_config.json`.

    Attributes:
      min_pixels, max_pixels: bounds of the area of an image; of a video, as the generation counts them, of the area of
        a frame or of frames * area.
      patch_size, temporal_patch_size, merge_size: see `qwenvl_jax.data.image.patchify`.
      fps, min_frames, max_frames: the sampling of videos.
      cap_tokens: what the rule for the size of a video caps by, where `cap_pixels_per_frame` is on, else None.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    cap_tokens: int | None = None

    @property
    def factor(self) -> int:
        """Pixels to the side of a merged token."""
        return self.patch_size * self.merge_size

    @property
    def cutting(self) -> tuple[int, int, int]:
        """How frames are cut; the same for images and videos of one model."""
        return self.patch_size, self.temporal_patch_size, self.merge_size


@dataclasses.dataclass(frozen=True)
class Settings:
    """The contents of a folder's files.

    Attributes:
      tokenizer: of `tokenizer.json`.
      chat_template: jinja source.
      tokenizer_config, image_config, video_config: the JSON objects of `tokenizer_config.json`,
        `preprocessor_config.json` and `video_preprocessor_config.json`; the last is empty where images and videos share
        the numbers of the first.
      model_config: the JSON object of `config.json`, empty where there is none; never written.
      generation: of the model.
      vision: of the keys of `vision_config` in `config.json`, those that the way to a batch depends on. Where there is
        no config.json, what `write` kept of it.
      dialect: "official" or "transformers".
    """

    tokenizer: Tokenizer
    chat_template: str
    tokenizer_config: dict[str, Any]
    image_config: dict[str, Any]
    video_config: dict[str, Any]
    model_config: dict[str, Any]
    generation: Generation
    vision: dict[str, int | float]
    dialect: str

    @classmethod
    def read(cls, folder: Path, dialect: str | None = None) -> "Settings":
        """Reads a folder in the public layout; `dialect` goes before what the folder says.

        Raises:
          CheckpointError: a file is missing or damaged, or none says which generation this is.
          ConfigError: a dialect that does not exist.
        """
        if dialect is not None and dialect not in DIALECTS:
            raise ConfigError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}.")
        tokenizer_config = _read_json(folder / "tokenizer_config.json", required=False)
        whole = _read_json(folder / "processor_config.json", required=False)  # where transformers 5 saves both
        within = Section(whole, str(folder / "processor_config.json"), "")
        image_config = _read_preprocessor(folder / "preprocessor_config.json", within, "image_processor")
        video_file = folder / "video_preprocessor_config.json"
        video_config = _read_preprocessor(video_file, within, "video_processor", required=False)
        model_config = _read_json(folder / "config.json", required=False)
        files = (whole, image_config, video_config, tokenizer_config)
        keys = ("processor_class", "video_processor_type")
        named = [name for key in keys for file in files if (name := file.get(key)) is not None]
        try:
            generation = find_generation(model_config.get("model_type"), named)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        if generation.needs_video_file and not video_config:
            _read_json(video_file)
        kept = _read_json(folder / DIALECT_FILE, required=False)
        if dialect is None:
            dialect = kept.get("dialect", "official")
            if dialect not in DIALECTS:
                raise CheckpointError(
                    f"{folder / DIALECT_FILE} has dialect {dialect!r}; it must be one of {', '.join(DIALECTS)}."
                )
        return cls(
            tokenizer=_read_tokenizer(folder),
            chat_template=_read_template(folder, tokenizer_config),
            tokenizer_config=tokenizer_config,
            image_config=image_config,
            video_config=video_config,
            model_config=model_config,
            generation=generation,
            vision=_vision_numbers(folder, model_config, kept)
            if generation.absolute_time or generation.windows
            else {},
            dialect=dialect,
        )

    def write(self, folder: Path):
        """Writes the files that `read` reads, here and in transformers, all or none; `folder` is made if missing.

        Videos get a file of their own even if they share the numbers of images: transformers does not find its video
        processor for every name of an image processor.

        Raises:
          CheckpointError: the folder cannot be written, or its `DIALECT_FILE` is damaged.
        """
        texts = self._texts(folder)
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder, ignore_cleanup_errors=True) as beside:
                for name, text in texts.items():
                    (Path(beside) / name).write_text(text, encoding="utf-8")
                for name in texts:
                    os.replace(Path(beside) / name, folder / name)
        except OSError as error:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise CheckpointError(
                f"{folder} cannot be written ({error}); nothing was saved, choose another place."
            ) from error

    def _texts(self, folder: Path) -> dict[str, str]:
        """The files by name."""
        texts = {"tokenizer.json": self.tokenizer.to_str(pretty=True)}
        named = {"processor_class": self.generation.processor_class}
        of_images = {key: value for key, value in self.image_config.items() if key != "image_processor_type"}
        of_videos = {**of_images, "video_processor_type": self.generation.video_processor, **named}
        ours = {"dialect": self.dialect, **({"vision_config": self.vision} if self.vision else {})}
        for name, value in (
            ("tokenizer_config.json", self.tokenizer_config),
            ("preprocessor_config.json", {**self.image_config, **named}),
            ("video_preprocessor_config.json", self.video_config or of_videos),
            # The file is shared: other keys of it stay.
            (DIALECT_FILE, {**_read_json(folder / DIALECT_FILE, required=False), **ours}),
        ):
            if value:
                texts[name] = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        return {**texts, "chat_template.jinja": self.chat_template}

    @property
    def tokens_per_second(self) -> float:
        """Positions in a second of a video, where the generation's positions tell absolute time; else 1."""
        return self.vision["tokens_per_second"] if self.generation.absolute_time else 1

    @property
    def window(self) -> int:
        """Side of an attention window of the tower in merged tokens, or 0.

        Raises:
          CheckpointError: a window that holds no whole merged token.
        """
        if not self.generation.windows:
            return 0
        size, patch, merge = (self.vision[key] for key in ("window_size", "patch_size", "spatial_merge_size"))
        if size < patch * merge:
            raise CheckpointError(
                f"config.json has vision_config.window_size={size}; it must be at least {patch * merge}, the side of a "
                "merged token in pixels: copy config.json from the model."
            )
        return int(size // merge // patch)

    def token_id(self, token: str) -> int:
        """The id of a special token.

        Raises:
          CheckpointError: the tokenizer does not have it.
        """
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"tokenizer.json has no token {token}; is it the tokenizer of a Qwen-VL model?")
        return found

    def named_token(self, role: str, otherwise: str) -> str:
        """What `tokenizer_config.json` names as "pad_token" or the like: a text, or an object that holds it.

        Raises:
          CheckpointError: it is something else.
        """
        token = self.tokenizer_config.get(role)
        text = (token.get("content") if isinstance(token, dict) else token) or otherwise
        if not isinstance(text, str):
            raise Section({}, "tokenizer_config.json", "").error(role, "a string, or an object with its content", token)
        return text

    @property
    def named_tokens(self) -> dict[str, str]:
        """The tokens that have a name in `tokenizer_config.json`, such as "eos_token", for the chat template."""
        roles = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
        return {role: token for role in roles if (token := self.named_token(role, ""))}


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; copy it from the model, or download the model again.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every failure
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({first_line(error)}); copy it again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _vision_numbers(folder: Path, model_config: dict[str, Any], kept: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of `vision_config` in config.json, else those kept in `DIALECT_FILE`, else the public models'."""
    file, values, otherwise = (
        ("config.json", model_config, _VISION_DEFAULTS) if model_config else (DIALECT_FILE, kept, _VISION_PUBLIC)
    )
    found = Section(values, str(folder / file), "").get("vision_config", dict, {})
    numbers = {key: otherwise[key] if found.get(key) is None else found[key] for key in otherwise}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(
                f"{file} has vision_config.{key}={value!r}; it must be a positive number: copy the file from the model."
            )
    return numbers


def media_config(
    values: dict[str, Any], file: str, *, video_of: Generation | None = None
) -> tuple[MediaConfig, np.ndarray]:
    """Sizes and pixel table out of one preprocessor file, refusing settings that would change the pixels unseen.

    Args:
      values: the JSON object of the file.
      file: its name, for errors.
      video_of: the generation, where the file is read for its videos.

    Raises:
      CheckpointError: a key that is missing, of another type, or of a value that is not supported.
    """
    whole = Section(values, file, "")
    size = Section(whole.get("size", dict, {}), file, "size.")
    older, renamed = ([of.get(key, int, None) for key in ("min_pixels", "max_pixels")] for of in (whole, size))
    edges = [size.get(key, int, None) for key in ("shortest_edge", "longest_edge")]
    newer = [b if a is None else a for a, b in zip(edges, renamed, strict=True)]
    first, then = (older, newer) if video_of is None or video_of.older_video_keys else (newer, older)
    bounds: list[Any] = [b if a is None else a for a, b in zip(first, then, strict=True)]
    missing = [key for key in ("patch_size", "image_mean", "image_std") if values.get(key) is None]
    if None in bounds:
        missing.append("size.shortest_edge and size.longest_edge")
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; copy the file from the model again.")
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("resample", 3)):
        if values.get(key, wanted) not in (wanted, None):
            raise CheckpointError(f"{file} has {key}={values[key]}; only {wanted} is supported.")
    table = pixel_table(
        _channels(whole, "image_mean"),
        _channels(whole, "image_std", positive=True),
        whole.get("rescale_factor", float, None) or 1 / 255,
        normalize=whole.get("do_normalize", bool, True),
    )
    cutting = {key: whole.get(key, int, 2) for key in ("patch_size", "temporal_patch_size", "merge_size")}
    whole.check_positive(cutting)
    config = MediaConfig(min_pixels=bounds[0], max_pixels=bounds[1], **cutting)
    if video_of:
        kinds: dict[str, type] = {"fps": float, "min_frames": int, "max_frames": int}
        sampled = {key: value for key, kind in kinds.items() if (value := whole.get(key, kind, None)) is not None}
        config = dataclasses.replace(config, **sampled)
        if whole.get("cap_pixels_per_frame", bool, False):
            tokens = whole.get("max_video_tokens", int, None) or video_of.max_video_tokens
            config = dataclasses.replace(config, cap_tokens=tokens)
    return config, table


def _channels(section: Section, key: str, *, positive: bool = False) -> tuple[float, ...]:
    """The three numbers under a key, one for each channel."""
    values = section.get(key, list)
    fit = (
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and (x > 0 or not positive)
        for x in values
    )
    if len(values) != 3 or not all(fit):
        raise section.error(key, f"a list of three {'positive ' if positive else ''}numbers", values)
    return tuple(values)


def _read_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """The chat template: a file of its own, or the one within `chat_template.json` or `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} is not readable text ({first_line(error)}); copy it again.") from error
    name, values = "chat_template.json", _read_json(folder / "chat_template.json", required=False)
    if not values.get("chat_template"):
        name, values = "tokenizer_config.json", tokenizer_config
    template = values.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template and not isinstance(template, str):
        section = Section({}, str(folder / name), "")
        raise section.error("chat_template", "a string, or a list of objects with name and template", template)
    if not template:
        raise CheckpointError(
            f"{folder} has no chat template (chat_template.jinja, chat_template.json, or in tokenizer_config.json); "
            "copy it from the model."
        )
    return template


def _read_preprocessor(path: Path, within: Section, key: str, required: bool = True) -> dict[str, Any]:
    """The object in a preprocessor file; where there is no such file, the one under a key of processor_config.json."""
    inner = {} if path.is_file() else within.get(key, dict, {})
    return inner or _read_json(path, required)


def _read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The object in a JSON file; empty where it is missing and not required."""
    if not path.is_file():
        if required:
            raise CheckpointError(
                f"{path.parent} has no {path.name}; copy it from the model, or download the model again."
            )
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}); copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}; copy it again.")
    return value
