"""What a model's folder says about text and pixels: tokenizer, chat template, and the two preprocessor files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qwenvl_jax.data.image import first_line, pixel_table
from qwenvl_jax.errors import CheckpointError, ConfigError

DIALECTS = ("official", "transformers")
DIALECT_FILE = "qwenvl_jax.json"


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """How images, or videos, are sized and cut; from `preprocessor_config.json` or `video_preprocessor_config.json`.

    Attributes:
      min_pixels, max_pixels: bounds of the area of an image, or of frames * area of a video.
      patch_size, temporal_patch_size, merge_size: see `qwenvl_jax.data.image.patchify`.
      fps, min_frames, max_frames: the sampling of videos.
      max_pixels_per_frame: cap on one frame of a video where `cap_pixels_per_frame` is on, else None.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    max_pixels_per_frame: int | None = None

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
        `preprocessor_config.json` and `video_preprocessor_config.json`.
      model_config: the JSON object of `config.json`, empty where there is none; never written.
      dialect: "official" or "transformers".
    """

    tokenizer: Tokenizer
    chat_template: str
    tokenizer_config: dict[str, Any]
    image_config: dict[str, Any]
    video_config: dict[str, Any]
    model_config: dict[str, Any]
    dialect: str

    @classmethod
    def read(cls, folder: Path, dialect: str | None = None) -> "Settings":
        """Reads a folder in the public layout; `dialect` goes before what the folder says.

        Raises:
          CheckpointError: a file is missing or damaged.
          ConfigError: a dialect that does not exist.
        """
        if dialect is not None and dialect not in DIALECTS:
            raise ConfigError(f"dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}.")
        tokenizer_config = _read_json(folder / "tokenizer_config.json", required=False)
        whole = _read_json(folder / "processor_config.json", required=False)  # where transformers 5 saves both
        configs = {}
        for key, file in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
            inner = whole.get(f"{key}_processor")
            configs[key] = inner if inner and not (folder / file).is_file() else _read_json(folder / file)
        if dialect is None:
            dialect = _read_json(folder / DIALECT_FILE, required=False).get("dialect", "official")
            if dialect not in DIALECTS:
                raise CheckpointError(
                    f"{folder / DIALECT_FILE} has dialect {dialect!r}; it must be one of {', '.join(DIALECTS)}."
                )
        return cls(
            tokenizer=_read_tokenizer(folder),
            chat_template=_read_template(folder, tokenizer_config),
            tokenizer_config=tokenizer_config,
            image_config=configs["image"],
            video_config=configs["video"],
            model_config=_read_json(folder / "config.json", required=False),
            dialect=dialect,
        )

    def write(self, folder: Path):
        """Writes the files that `read` reads, here and in transformers; `folder` is made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        for name, value in (
            ("tokenizer_config.json", self.tokenizer_config),
            ("preprocessor_config.json", self.image_config),
            ("video_preprocessor_config.json", self.video_config),
            # The file is shared: other keys of it stay.
            (DIALECT_FILE, {**_read_json(folder / DIALECT_FILE, required=False), "dialect": self.dialect}),
        ):
            if value:
                text = json.dumps(value, indent=2, ensure_ascii=False)
                (folder / name).write_text(text + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

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
        """What `tokenizer_config.json` names as "pad_token" or the like: a text, or an object that holds it."""
        token = self.tokenizer_config.get(role)
        return (token.get("content") if isinstance(token, dict) else token) or otherwise


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


def media_config(values: dict[str, Any], file: str, video: bool = False) -> tuple[MediaConfig, np.ndarray]:
    """Sizes and pixel table out of one preprocessor file, refusing settings that would change the pixels unseen."""
    size = values.get("size") or {}
    low, high = size.get("shortest_edge", values.get("min_pixels")), size.get("longest_edge", values.get("max_pixels"))
    missing = [key for key in ("patch_size", "image_mean", "image_std") if values.get(key) is None]
    if low is None or high is None:
        missing.append("size.shortest_edge and size.longest_edge")
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; copy the file from the model again.")
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("resample", 3)):
        if values.get(key, wanted) not in (wanted, None):
            raise CheckpointError(f"{file} has {key}={values[key]}; only {wanted} is supported.")
    table = pixel_table(
        values["image_mean"],
        values["image_std"],
        values.get("rescale_factor") or 1 / 255,
        normalize=values.get("do_normalize") is not False,
    )
    config = MediaConfig(
        min_pixels=low,
        max_pixels=high,
        patch_size=values["patch_size"],
        temporal_patch_size=values.get("temporal_patch_size") or 2,
        merge_size=values.get("merge_size") or 2,
    )
    if video:
        sampled = {key: values[key] for key in ("fps", "min_frames", "max_frames") if values.get(key) is not None}
        config = dataclasses.replace(config, **sampled)
        if values.get("cap_pixels_per_frame"):
            tokens = values.get("max_video_tokens") or 768
            config = dataclasses.replace(config, max_pixels_per_frame=tokens * config.factor**2)
    return config, table


def _read_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """The chat template: a file of its own, or the one within `chat_template.json` or `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json", required=False).get("chat_template")
    template = template or tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not template:
        raise CheckpointError(
            f"{folder} has no chat template (chat_template.jinja, chat_template.json, or in tokenizer_config.json); "
            "copy it from the model."
        )
    return template


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
