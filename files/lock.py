"""One process at a time, by a lock on a file that may be removed while others wait for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock on a file, which is made where it is missing. No lock is held where the system has none.

    Args:
        path: the file. Whoever holds the lock may remove it.
        wait: whether to wait for another holder.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        OSError: the file cannot be made; `FileNotFoundError` where its folder has gone.
    """
    if fcntl is None:
        yield
        return
    descriptor = _descriptor(path, wait)
    try:
        yield
    finally:
        os.close(descriptor)


def _descriptor(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _flock(descriptor, wait)
            # The holder before may have removed the file that was opened here: that lock keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:  # some file systems say the latter
        raise BlockingIOError(*error.args) from error
    except OSError:
        pass  # a file system without locks
