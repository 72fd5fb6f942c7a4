"""Where images and videos come from: files here, bytes in memory and, where the caller allows it, object stores.

All become a file that this machine can open. Bytes and what is fetched go to a temporary one, which is removed when
nothing needs it any more. Addresses go through fsspec, and only those that begin as the caller allows: a record may
come from anyone, and an address in it must not reach what this machine may read and its writer may not.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from qwenvl_jax.data.image import check_file, first_line
from qwenvl_jax.errors import ConfigError, MediaError

MAX_FETCHED_BYTES = {"image": 256 << 20, "video": 32 << 30}
_BLOCK = 8 << 20
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class LocalFile:
    """A file that this machine can open.

    Attributes:
      path: of the file.
      name: what errors call it, such as "video clip.mp4".
      temporary: whether it goes when this object does.
    """

    path: Path
    name: str
    temporary: bool = False


def is_remote(source: Any) -> bool:
    """Whether this is an address such as "gs://bucket/clip.mp4", and no path."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def check_remote(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The beginnings of addresses that a caller allows.

    Raises:
      ConfigError: one is no beginning of an address.
    """
    if isinstance(prefixes, str) or not all(isinstance(p, str) and re.match(r"[\w+.-]+://", p) for p in prefixes):
        raise ConfigError(
            "remote_media must be a list of the beginnings of addresses that may be fetched, such as "
            f"['gs://my-bucket/'], got {prefixes!r}."
        )
    return tuple(prefixes)


def local_file(source: str | Path | bytes, kind: str, remote: Sequence[str] = ()) -> LocalFile:
    """The file of an image or a video.

    Args:
      source: path, the bytes of a file, or an address.
      kind: "image" or "video", for errors.
      remote: beginnings of the addresses that may be fetched.

    Raises:
      MediaError: it is missing, empty, not allowed, cannot be fetched, or is larger than `MAX_FETCHED_BYTES`.
    """
    if isinstance(source, bytes):
        if not source:
            raise MediaError(f"{kind} of 0 bytes is empty; give the whole bytes of a file.")
        file = _temporary()
        file.write(source)
        return _held(file, f"{kind} of {len(source)} bytes")
    if isinstance(source, str) and is_remote(source):
        return _fetched(source, kind, remote)
    path = check_file(source, kind)
    return LocalFile(path, f"{kind} {path}")


def _temporary() -> IO[bytes]:
    return tempfile.NamedTemporaryFile(prefix="qwenvl-media-")


def _held(file: IO[bytes], name: str) -> LocalFile:
    file.flush()
    local = LocalFile(Path(file.name), name, temporary=True)
    weakref.finalize(local, file.close)
    return local


def _fetched(address: str, kind: str, remote: Sequence[str]) -> LocalFile:
    name, most = f"{kind} {address}", MAX_FETCHED_BYTES[kind]
    # A chain ("zip://a::gs://b") or a step upwards would leave what the prefix allows.
    allowed = any(address.startswith(prefix) for prefix in remote)
    if not allowed or "::" in address or ".." in re.split(r"[/\\]", address):
        scheme = address.partition("://")[0]
        raise MediaError(
            f"{name} is not on this machine, and fetching it is not allowed; copy it here and give its path, or allow "
            f"it: remote_media=['{scheme}://...'] of Processor.from_pretrained or of a stage's data, or --remote-media."
        )
    import fsspec

    file, length = _temporary(), 0
    try:
        with fsspec.open(address, "rb") as stored:
            while block := stored.read(_BLOCK):
                length += len(block)
                if length > most:
                    raise MediaError(
                        f"{name} is larger than {most >> 20} MiB, the most that is fetched; copy it here and give its "
                        "path."
                    )
                file.write(block)
    except MediaError:
        raise
    except Exception as error:  # every store has errors of its own
        raise MediaError(
            f"{name} cannot be fetched ({first_line(error)}); check the address, the permission to read it, and that "
            "fsspec's package for its kind of store is installed (gcsfs for gs://, s3fs for s3://)."
        ) from error
    if not length:
        raise MediaError(f"{name} is empty (0 bytes); make or copy it again.")
    return _held(file, name)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to fill, which becomes `path` when all went well; otherwise nothing is left of it.

    Raises:
      OSError: it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:8]}.", delete=False) as file:
        try:
            yield file
            file.close()  # which tells, too, that there is no room
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
