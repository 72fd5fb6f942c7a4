"""From what a user names, a local path or a hub id, to a folder of files."""

import re
from pathlib import Path

from qwenvl_jax.errors import CheckpointError

HUB_TIMEOUT_SECONDS = 5.0
SMALL_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model.

    Args:
      name_or_path: a folder, or a hub id such as "Qwen/Qwen3-VL-4B-Instruct". A folder of that name comes first.
      weights: whether the tensors are wanted too; without them only configuration and tokenizer are downloaded.

    Returns:
      The folder given, or the one in Hugging Face's cache.

    Raises:
      CheckpointError: the name is neither a folder nor a hub id that can be reached or was downloaded before.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{name_or_path} is a file, not a model folder; give the folder that holds config.json and *.safetensors."
        )
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise CheckpointError(
            f"{name_or_path!r} is neither a folder that exists nor a hub id; give a folder that holds config.json, or "
            "an id of the form owner/name such as Qwen/Qwen3-VL-4B-Instruct."
        )
    return _download(str(name_or_path), SMALL_FILES + (WEIGHT_FILES if weights else ()))


def _download(hub_id: str, patterns: tuple[str, ...]) -> Path:
    """Downloads the files of a hub id that match `patterns`, or finds them in the cache when the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # The listing is asked for by itself because it takes a timeout; the download then names the exact revision.
        revision = huggingface_hub.HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_SECONDS).sha
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=list(patterns), etag_timeout=HUB_TIMEOUT_SECONDS
        )
        return Path(folder)
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a folder nor a model on the hub that you may read; check the spelling, or log in "
            "with `hf auth login` if it is private or gated."
        ) from error
    except (OSError, HfHubHTTPError, *_transport_errors()) as error:
        reason = _first_line(error)
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id!r} is not a folder, was not downloaded before, and the hub cannot be reached ({reason}); check "
            "the spelling and the connection, or give a local folder."
        ) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """Connection errors of the HTTP client that huggingface_hub uses, which are no OSErrors with every client."""
    import httpx

    return (httpx.HTTPError,)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
