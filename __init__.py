"""pmm: speech to ARKit facial animation (PMMTalk), with the frozen features cached once.

Importing this package loads nothing heavy; torch, zarr and transformers come in with the
sub-packages that need them.
"""

__version__ = "0.1.0"


class PmmError(Exception):
    """The root of every error a user can cause.

    The message is one line that says what was found, what was expected, where, and what to do:
    the command line prints it after ``pmm: error:`` and adds nothing. Each kind below is also
    the builtin it refines, so that callers who know only builtins still catch it.
    """


class NotFound(PmmError, FileNotFoundError):
    """A file, folder, store, clip or style that was named is not there."""


class AlreadyThere(PmmError, FileExistsError):
    """Something stands where we were asked to write; nothing of the user's is ever replaced."""


class BadInput(PmmError, ValueError):
    """A file or an option holds something we cannot use."""


class ExtraMissing(PmmError, ImportError):
    """An optional library is needed and not installed; the message carries the pip line."""


class StoreCorrupt(PmmError, OSError):
    """Bytes in a store are not the bytes that were published."""


class NewerFormat(PmmError, ValueError):
    """A store or run written by a newer pmm than this one."""
