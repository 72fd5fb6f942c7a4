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
    # An empty name is a mistake, though as a path it is the current folder.
    if path.is_dir() and str(name_or_path):
        return path
    if path.is_file():
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
    """Downloads the files of a hub id that match `patterns`; out of the hub's reach, finds them in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=list(patterns), etag_timeout=HUB_TIMEOUT_SECONDS, library_name="qwenvl_jax"
            )
        )
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id!r} is neither a folder nor a model on the hub that you may read; check the spelling, or log in "
            "with `hf auth login` if it is private or gated."
        ) from error
    except LocalEntryNotFoundError as error:
        # snapshot_download gives this one for every failed connection, whichever HTTP library it uses, once it has
        # looked in the cache.
        raise CheckpointError(
            f"{hub_id!r} is not a folder, was not downloaded before, and the hub cannot be reached; check the "
            "spelling and the connection, or give a local folder."
        ) from error
    except (OSError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{hub_id!r} is not a folder, and downloading it from the hub failed: {reason.rstrip('.')}; try again, or "
            "give a local folder."
        ) from error
