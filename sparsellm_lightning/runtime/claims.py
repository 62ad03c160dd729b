"""One run at a time writes to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from sparsellm_lightning.errors import UserError


@contextmanager
def claimed(folder: str | Path, setting: str) -> Iterator[None]:
    """Keep other runs from writing to a folder inside this context. A run that is killed releases its claim.

    Args:
        folder: need not exist.
        setting: that names it, for the message.

    Raises:
        UserError: another run has claimed the folder, or nothing can be written beside it.
    """
    target = Path(folder).resolve()  # "." has no name
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # filelock takes a folder without write permission for one that is locked.
        with TemporaryFile(dir=target.parent):
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{setting} {folder} is being written by another run. Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise UserError(
            f"{setting} must be writable, but {folder} is not: {error.strerror or error}. Choose another folder."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            Path(lock.lock_file).unlink()
        lock.release()
