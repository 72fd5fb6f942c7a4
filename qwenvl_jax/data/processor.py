"""`Processor`: from conversations, as users write them, to samples and batches; for training and serving alike.

    conversation -> media opened and measured -> text rendered, placeholders expanded -> token ids -> positions, targets
                                              -> pixels decoded, resized, cut into patches

Everything a model was trained with (token ids, template, sizes, normalisation) is read from its folder.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.batch import Batch
from qwenvl_jax.checkpoint.folder import resolve
from qwenvl_jax.data import chat, positions
from qwenvl_jax.data.collate import collate
from qwenvl_jax.data.coordinates import Sizes
from qwenvl_jax.data.files import check_remote
from qwenvl_jax.data.media import MediaOpener, Opened
from qwenvl_jax.data.sample import Media, Sample
from qwenvl_jax.data.settings import Settings, media_config
from qwenvl_jax.data.times import check_time_format, time_text
from qwenvl_jax.errors import CheckpointError, ConversationError, DataError, MediaError

_IMAGE_PAD, _VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a conversation will take, known without decoding pixels.

    Attributes:
      tokens: length of the sample.
      loss_tokens: how many of its targets are the assistant's.
      grids: (t, h, w) in patches of each image and video, in reading order.
      times: seconds of the temporal patches of each; empty for an image.
    """

    tokens: int
    loss_tokens: int
    grids: tuple[tuple[int, int, int], ...]
    times: tuple[tuple[float, ...], ...]


class Processor:
    """Turns conversations into samples and batches as the model's folder says.

    Attributes:
      tokenizer: `tokenizers.Tokenizer`.
      dialect: "official" or "transformers".
      generation: `qwenvl_jax.data.generations.Generation` of the model.
      image, video: `qwenvl_jax.data.settings.MediaConfig`, how images and videos are sized and cut.
      pixel_table: f32[3, 256], what each byte of each channel is to the model.
      pad_token_id, eos_token_id, image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids.
      merge_size: patches to the side of a merged token.
      window: side of an attention window of the tower in merged tokens, 0 for a tower without windows.
      tokens_per_second: time positions in a second of a video, where positions tell absolute time (Qwen2.5-VL); else 1.
      patch_dim: bytes in a patch.
      opener: `qwenvl_jax.data.media.MediaOpener`, which chooses the frames and sizes of media.
    """

    def __init__(self, settings: Settings, remote_media: Sequence[str] = ()):
        """Builds a processor from the contents of a folder's files; see `from_pretrained`."""
        self._settings = settings
        self.tokenizer, self.dialect, self.generation = settings.tokenizer, settings.dialect, settings.generation
        self.image, self.pixel_table = media_config(settings.image_config, "preprocessor_config.json")
        file = "video_preprocessor_config.json" if settings.video_config else "preprocessor_config.json"
        self.video, video_table = media_config(
            settings.video_config or settings.image_config, file, video_of=settings.generation
        )
        if not np.array_equal(self.pixel_table, video_table) or self.image.cutting != self.video.cutting:
            raise CheckpointError(
                "preprocessor_config.json and video_preprocessor_config.json must agree on patch_size, "
                "temporal_patch_size, merge_size, image_mean and image_std; copy both from one model."
            )
        self._encoder = chat.TextEncoder(settings.tokenizer)
        self.image_token_id = settings.token_id(_IMAGE_PAD)
        self.video_token_id = settings.token_id(_VIDEO_PAD)
        self.vision_start_token_id = settings.token_id(_VISION_START)
        self.vision_end_token_id = settings.token_id(_VISION_END)
        self.pad_token_id = settings.token_id(settings.named_token("pad_token", "<|endoftext|>"))
        self.eos_token_id = settings.token_id(settings.named_token("eos_token", _TURN_END))
        self.merge_size, self.window = self.image.merge_size, settings.window
        self.tokens_per_second = settings.tokens_per_second
        self.patch_dim = 3 * self.image.temporal_patch_size * self.image.patch_size**2
        self.opener = MediaOpener(
            self.image, self.video, self.generation, self.dialect, self.tokens_per_second, check_remote(remote_media)
        )
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            wanted, found = settings.model_config.get(key), getattr(self, key)
            if wanted is not None and wanted != found:
                raise CheckpointError(
                    f"config.json says {key}={wanted}, but the tokenizer has {found}; take both files from one model."
                )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dialect: str | None = None, *, remote_media: Sequence[str] = ()
    ) -> "Processor":
        """Reads tokenizer, chat template and preprocessor settings from a model's folder.

        Args:
          path: folder in the public layout or the native one, or a hub id.
          dialect: "official" or "transformers"; without it, what `qwenvl_jax.json` in the folder says, else "official".
          remote_media: beginnings of the addresses from which images and videos may be fetched, through fsspec, such as
            `["gs://my-bucket/"]`; without them only files of this machine are read. End one with a slash, since
            "gs://my" allows every bucket whose name begins so. They are fetched anew each time they are needed.

        Raises:
          CheckpointError: a file is missing or damaged, the files do not go together or do not tell which generation
            this is, or the tokenizer lacks Qwen-VL's marks.
          ConfigError: a dialect that does not exist, or remote media that are no addresses.
        """
        check_remote(remote_media)
        folder = resolve(path, weights=False)
        settings = Settings.read(folder, dialect)
        try:
            return cls(settings, remote_media)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def fetching(self, remote_media: Sequence[str]) -> "Processor":
        """The same processor with other `remote_media`; see `from_pretrained`.

        Raises:
          ConfigError: they are no beginnings of addresses.
        """
        return Processor(self._settings, remote_media)

    def save_pretrained(self, folder: str | Path):
        """Writes the files that `from_pretrained` reads, here and in transformers; `folder` is made if missing.

        Raises:
          CheckpointError: the folder cannot be written; nothing is.
        """
        self._settings.write(Path(folder))

    def __call__(
        self,
        conversations: Sequence[list[dict]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[dict] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        time_format: str = "seconds",
        length: int | None = None,
        groups: int = 1,
        vision_shape: tuple[tuple[int, int], ...] | None = None,
        vision_multiple: int = 1,
    ) -> Batch:
        """A batch with one conversation a row, padded on the right.

        Args:
          conversations: each a list of messages.
          add_generation_prompt: whether each ends with the assistant's turn opened.
          tools, chat_template_kwargs, time_format: of all of them; see `sample`.
          length, groups, vision_shape, vision_multiple: see `qwenvl_jax.data.collate.collate`.

        Raises:
          ConversationError, MediaError: what is wrong, and where.
          DataError: the shapes asked for do not hold the conversations.
        """
        if isinstance(conversations, dict) or (conversations and isinstance(conversations[0], dict)):
            raise ConversationError(
                "processor() takes a list of conversations, got one; write processor([conversation])."
            )
        if not conversations:
            raise ConversationError("processor() takes a list of at least one conversation, got an empty one.")
        rows = [
            [
                self.sample(
                    conversation,
                    add_generation_prompt,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                    time_format=time_format,
                )
            ]
            for conversation in conversations
        ]
        return collate(
            rows,
            length=length,
            pixel_table=self.pixel_table,
            groups=groups,
            vision_shape=vision_shape,
            vision_multiple=vision_multiple,
            merge_size=self.merge_size,
            pad_token_id=self.pad_token_id,
            patch_dim=self.patch_dim,
            window=self.window,
        )

    def sample(
        self,
        conversation: list[dict],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[dict] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        time_format: str = "seconds",
        read: Callable[[dict, Callable[[], np.ndarray]], np.ndarray] | None = None,
    ) -> Sample:
        """One conversation with its pixels.

        Args:
          conversation: a list of messages.
          add_generation_prompt: whether it ends with the assistant's turn opened.
          tools: functions in JSON schema that the assistant may call, for a chat template that tells of them.
          chat_template_kwargs: further names that the chat template takes, such as `{"enable_thinking": False}`.
          time_format: one of `qwenvl_jax.data.times.TIME_FORMATS`, how the times of frames are written, where the
            model's generation writes them. Models are asked in "seconds"; "hms" is for training data.
          read: given the part of each image and video, in reading order, and a function that decodes it, returns its
            patches; a cache of decoded media comes in here.

        Raises:
          ConversationError: a malformed message, named by its index, or one that the chat template has no place for.
          MediaError: an image or video that cannot be used, named by its file.
          ConfigError: a time format that does not exist.
        """
        opened = self._open(conversation)
        sample = self._tokens(conversation, opened, add_generation_prompt, tools, chat_template_kwargs, time_format)
        read = read or (lambda part, load: load())
        media = tuple(Media(o.kind, read(o.part, o.load), o.grid, o.times, o.pool) for o in opened)
        return dataclasses.replace(sample, media=media)

    def measure(
        self,
        conversation: list[dict],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[dict] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        time_format: str = "seconds",
    ) -> Facts:
        """What `sample` would give, without decoding a pixel (a sampler that goes by motion decodes small ones).

        Raises:
          ConversationError, MediaError, ConfigError: as `sample`, except for damage that only decoding shows.
        """
        opened = self._open(conversation)
        sample = self._tokens(conversation, opened, add_generation_prompt, tools, chat_template_kwargs, time_format)
        return Facts(
            tokens=len(sample.tokens),
            loss_tokens=int(sample.loss_weights.sum()),
            grids=tuple(o.grid for o in opened),
            times=tuple(o.times for o in opened),
        )

    def picture_sizes(self, part: dict) -> Sizes:
        """The sizes of an image, or of the frames of a video, that the coordinates of boxes and points are counted in.

        Args:
          part: of a conversation.

        Raises:
          ConversationError, MediaError: a part that is malformed, or a medium that cannot be used.
        """
        (opened,) = self._open([{"role": "user", "content": [part]}])
        _, h, w = opened.grid
        height, width = opened.size
        return Sizes((height, width), (h * self.image.patch_size, w * self.image.patch_size))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def pixel_values(self, batch: Batch) -> np.ndarray:
        """The reference's float patches of a batch: images first, then videos, each in reading order.

        Returns:
          f32[N, 3*tau*P*P].

        Raises:
          DataError: the batch pools media, which the reference does not.
        """
        merged, is_video = self._merged_in_order(batch)
        if not len(merged):
            return np.empty((0, self.patch_dim), np.float32)
        groups = len(batch.vision[0].patches)
        patches = np.concatenate(
            [np.asarray(v.patches).reshape(groups, -1, self.merge_size**2, self.patch_dim) for v in batch.vision],
            axis=1,
        )
        picked = np.concatenate([patches[tuple(part.T)] for part in (merged[~is_video], merged[is_video])])
        values = picked.reshape(-1, 3, self.patch_dim // 3)
        table = np.asarray(batch.vision[0].pixel_table)[0]
        return np.stack([table[c][values[:, c]] for c in range(3)], axis=1).reshape(-1, self.patch_dim)

    def grids(self, batch: Batch) -> np.ndarray:
        """i64[n, 3]: (t, h, w) in patches of the images of a batch, then of its videos, each in reading order.

        Raises:
          DataError: the batch pools media, and does not tell.
        """
        merged, is_video = self._merged_in_order(batch)
        found = []
        if len(merged):
            groups, block = len(batch.vision[0].items), self.merge_size**2
            items = np.concatenate([np.asarray(v.items).reshape(groups, -1)[:, ::block] for v in batch.vision], axis=1)
            sizes = np.concatenate(
                [np.asarray(v.sizes).reshape(groups, -1, 2)[:, ::block] for v in batch.vision], axis=1
            )
            for part in (merged[~is_video], merged[is_video]):
                keys = np.stack([part[:, 0], items[tuple(part.T)]], axis=1)
                _, first, count = np.unique(keys, axis=0, return_index=True, return_counts=True)
                for place, tokens in sorted(zip(first.tolist(), count.tolist(), strict=True)):
                    h, w = sizes[tuple(part[place])].tolist()
                    found.append((tokens * block // (h * w), h, w))
        return np.asarray(found, np.int64).reshape(-1, 3)

    def _merged_in_order(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """i64[M, 2], group and merged token of each vision token in reading order; bool[M], whether it is of video."""
        if batch.pool_index is not None:
            raise DataError(
                "the batch pools images or videos, whose patches cannot be told from it one by one; make it without "
                "pool to compare it with the reference."
            )
        index_BT = np.asarray(batch.vision_index)
        row, slot = np.nonzero(index_BT >= 0)
        groups = len(batch.vision[0].patches) if batch.vision else 1
        merged = np.stack([row // (len(index_BT) // groups), index_BT[row, slot]], axis=1)
        return merged, np.asarray(batch.tokens)[row, slot] == self.video_token_id

    def _open(self, conversation: list[dict]) -> list[Opened]:
        """Checks the conversation, opens its media and chooses their frames and sizes."""
        chat.check_conversation(conversation)
        opened = []
        for where, part in chat.parts_of(conversation, ("image", "video")):
            try:
                opened.append(self.opener.open(part))
            except (MediaError, ConversationError) as error:
                raise type(error)(f"{where}: {error}") from error
        return opened

    def _tokens(
        self,
        conversation: list[dict],
        opened: list[Opened],
        add_generation_prompt: bool,
        tools: Sequence[dict] | None,
        chat_template_kwargs: dict[str, Any] | None,
        time_format: str,
    ) -> Sample:
        """Everything of a sample but its media."""
        check_time_format(time_format)
        chat.check_tools(tools)
        chat.check_template_values(self._settings.chat_template, chat_template_kwargs)
        guard = self._encoder.guard_for(conversation, tools, chat_template_kwargs)
        values = self._encoder.protect_value(chat_template_kwargs or {}, guard)
        text = chat.render(
            self._settings.chat_template,
            self._encoder.protect(conversation, guard),
            add_generation_prompt=add_generation_prompt,
            tools=self._encoder.protect_value(tools, guard),
            **{**self._settings.named_tokens, **values},
        )
        text = self._place_media(text, opened, time_format)
        encoded = self._encoder.encode(text, guard)
        learnt = np.zeros(len(encoded.ids), bool)
        for start, end in chat.learnt_spans(text, _TURN_START, _TURN_END):
            learnt |= (encoded.starts >= start) & (encoded.starts < end)
        # Each run of vision stands in the text as one placeholder; here it takes its merged tokens.
        is_image, is_video = encoded.ids == self.image_token_id, encoded.ids == self.video_token_id
        lengths = np.ones(len(encoded.ids), np.int64)
        lengths[is_image | is_video] = [
            t * h * w // self.merge_size**2 for one in opened for t, h, w in self._runs(one)
        ]
        tokens, learnt = np.repeat(encoded.ids, lengths), np.repeat(learnt, lengths)
        kinds = np.repeat(is_image * positions.IMAGE + is_video * positions.VIDEO, lengths).astype(np.uint8)
        seen = kinds != positions.TEXT
        videos = [one for one in opened if one.kind == "video"]
        return Sample(
            tokens=tokens,
            positions=positions.mrope_positions(
                kinds,
                [one.shown_grid(self.merge_size) for one in opened if one.kind == "image"],
                [grid for one in videos for grid in self._runs(one)],
                merge_size=self.merge_size,
                video_steps=[one.steps for one in videos for _ in self._runs(one)],
                past_time=self.dialect == "official",
            ),
            targets=np.append(tokens[1:], tokens[-1:]),
            loss_weights=np.append(learnt[1:], False).astype(np.float32),
            vision_index=np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32),
        )

    def _runs(self, one: Opened) -> list[tuple[int, int, int]]:
        """The grids of the runs of vision tokens that a medium becomes, in patches; see `Opened.shown_grid`."""
        grid = one.shown_grid(self.merge_size)
        if one.kind == "video" and self.generation.written_times:
            return positions.split_frames([grid])
        return [grid]

    def _place_media(self, text: str, opened: list[Opened], time_format: str) -> str:
        """Puts a placeholder for each run of vision, after its time if that is written, where the template left one for
        each medium.
        """
        pieces, place = [], 0
        for one in opened:
            pad = _IMAGE_PAD if one.kind == "image" else _VIDEO_PAD
            at = text.find(pad, place)
            if at < 0:
                raise CheckpointError(
                    f"the chat template shows fewer media than the conversation's {len(opened)}; is it the template of "
                    "a vision model?"
                )
            before, place = text[place:at], at + len(pad)
            if one.kind == "image" or not self.generation.written_times:
                pieces += [before, pad]
                continue
            frames = "".join(
                f"{time_text(seconds, time_format)}{_VISION_START}{_VIDEO_PAD}{_VISION_END}" for seconds in one.times
            )
            if self.dialect == "official" and before.endswith(_VISION_START) and text.startswith(_VISION_END, place):
                before, place = before.removesuffix(_VISION_START), place + len(_VISION_END)
            pieces += [before, frames]
        rest = text[place:]
        if _IMAGE_PAD in rest or _VIDEO_PAD in rest:
            raise CheckpointError(f"the chat template shows more media than the conversation's {len(opened)}.")
        return "".join([*pieces, rest])
