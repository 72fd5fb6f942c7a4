"""Errors a user can cause.

Every one of them derives from `QwenVLError` and carries one line: which argument or file, what was expected, what came,
and what to do. The command line prints that line and exits with status 2; libraries may catch the base class.
`StoreError` alone is of another kind: nobody's mistake, and told with status 1.
"""


class QwenVLError(Exception):
    """Base of all errors that input, files or settings can cause; the message is one line with a remedy."""


class ConfigError(QwenVLError):
    """A setting that does not exist, or a value that cannot be used."""


class CheckpointError(QwenVLError):
    """A model folder that is incomplete, damaged, or of another kind than it says."""


class MediaError(QwenVLError):
    """An image or video that cannot be read, or whose size or times cannot be used."""


class ConversationError(QwenVLError):
    """A conversation whose messages or parts are malformed."""


class DataError(QwenVLError):
    """A data set or record that cannot be used for training."""


class SourceError(DataError):
    """A data set that cannot be read any more: no fault of one of its records, so that none is left out for it."""


class StoreError(OSError):
    """A bucket that does not answer as it did before: the same command, started again, may find it well."""
