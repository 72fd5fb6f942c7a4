"""From what a user names, a local path, an address in a bucket or a hub id, to a folder of files."""

import contextlib
import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from qwenvl_jax.errors import CheckpointError

HUB_TIMEOUT_SECONDS = 5.0
SMALL_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)

# Where files out of buckets are kept for the next start, a folder for each address.
BUCKET_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenvl_jax" / "buckets"

_ADDRESS = re.compile(r"(gs|s3)://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model.

    Args:
      name_or_path: a folder, or one in a bucket ("gs://bucket/run/model"), or a hub id such as
        "Qwen/Qwen3-VL-4B-Instruct". A folder of that name comes first.
      weights: whether the tensors are wanted too; without them only configuration and tokenizer are downloaded.

    Returns:
      The folder given, or the one in Hugging Face's cache, or in `BUCKET_CACHE`.

    Raises:
      CheckpointError: the name is neither a folder nor a hub id that can be reached or was downloaded before; or a
        bucket that cannot be read, or that has no model there.
    """
    path = Path(name_or_path).expanduser()
    # An empty name is a mistake, though as a path it is the current folder.
    if path.is_dir() and str(name_or_path):
        return path
    if path.is_file():
        raise CheckpointError(
            f"{name_or_path} is a file, not a model folder; give the folder that holds config.json and *.safetensors."
        )
    patterns = SMALL_FILES + (WEIGHT_FILES if weights else ())
    if _ADDRESS.match(str(name_or_path)):
        return _fetched(str(name_or_path).rstrip("/"), patterns)
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise CheckpointError(
            f"{name_or_path!r} is neither a folder that exists nor a hub id; give a folder that holds config.json, or "
            "an id of the form owner/name such as Qwen/Qwen3-VL-4B-Instruct."
        )
    return _download(str(name_or_path), patterns)


def _fetched(address: str, patterns: tuple[str, ...]) -> Path:
    """Copies the files of a folder in a bucket that match `patterns`; those that are here as they are there stay."""
    from etils import epath

    name = address.rpartition("/")[2]
    folder = BUCKET_CACHE / f"{name}-{hashlib.sha256(address.encode()).hexdigest()[:16]}"
    try:
        found = {path.name: path for path in epath.Path(address).iterdir()}
    except FileNotFoundError:
        found = {}
    except Exception as error:  # each store has its own
        raise _unread(address, error) from error
    wanted = {name for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    if not wanted:
        raise CheckpointError(f"{address} holds no files of a model; give the address of the folder with config.json.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in found and not path.name.startswith("."):
                path.unlink(missing_ok=True)  # of a model that lay there before
        for name in sorted(wanted):
            _copied(found[name], folder / name)
    except Exception as error:
        raise _unread(address, error) from error
    return folder


def _copied(source, target: Path) -> None:
    """Copies a file out of a bucket, unless it is there with that size and time."""
    state = source.stat()
    with contextlib.suppress(FileNotFoundError):
        here = target.stat()
        if state.mtime and (here.st_size, int(here.st_mtime)) == (state.length, int(state.mtime)):
            return
    # Processes of a run may do so at once: each has a file of its own until it is whole.
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as making:
        made = Path(making) / target.name
        with source.open("rb") as file, made.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 24)
        if state.mtime:
            os.utime(made, (state.mtime, state.mtime))
        os.replace(made, target)


def _unread(address: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{address} cannot be read, or copied into {BUCKET_CACHE} ({reason}); check the address, your credentials, for "
        "gs:// that gcsfs is installed (pip install 'qwenvl_jax[gcs]'), and that there is room (XDG_CACHE_HOME names "
        "another place)."
    )


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
