"""A new folder that appears all at once, and files of another one brought into it as copies or links."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


LINKS = ("copy", "hardlink", "symlink", "reflink-if-possible")
COPY_CHUNK = 16 * 2**20
# The request of linux/fs.h that makes a file share the blocks of another one until either is written to.
FICLONE = 0x40049409
NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that becomes it in one rename when the block succeeds.

    What is in it is flushed to disk first. Until then the destination does not exist; when the block fails, or the
    process dies, no half of it does. What a dead process left behind is removed by the next one with the same
    destination.

    Raises:
        FileExistsError: if the destination exists and is not an empty folder, or another process is making it.
        OSError: if the destination cannot be written, or its disk is full.
    """
    _check_free(destination)
    folder = destination.parent / f".{destination.name}.partial-{os.urandom(4).hex()}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination)
        folder.mkdir()
        lock = _lock(folder)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            error.errno,
            f"destination must be in a folder that can be written to; making {destination} failed "
            f"({error.strerror}). Choose another destination",
        ) from error
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _flush_to_disk(path)
        _check_free(destination)
        folder.rename(destination)
        _flush_to_disk(destination.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"destination must have room for the checkpoint; writing {destination} failed ({error.strerror}) and "
                "nothing was left behind. Free some space, choose another destination, or use link='hardlink' or "
                "'symlink', which take no space for the base's weights",
            ) from error
        raise
    finally:
        os.close(lock)


def _check_free(destination: Path) -> None:
    if destination.is_symlink() or (destination.exists() and (not destination.is_dir() or any(destination.iterdir()))):
        raise FileExistsError(
            f"destination must not exist or be an empty folder; {destination} is not empty. "
            "Choose another destination, or remove it first."
        )


def _remove_leftovers(destination: Path) -> None:
    """Removes what dead processes began; a live one holds the lock of its folder."""
    pattern = re.compile(re.escape(f".{destination.name}.partial-") + "[0-9a-f]{8}")
    for leftover in destination.parent.iterdir():
        if not pattern.fullmatch(leftover.name):
            continue
        try:
            os.close(_lock(leftover))
        except BlockingIOError:
            raise FileExistsError(
                f"destination must be made by one process at a time; another one is writing {destination} "
                f"(in {leftover}). Wait for it, or choose another destination."
            ) from None
        shutil.rmtree(leftover)


def _lock(folder: Path) -> int:
    """A descriptor that holds an exclusive lock on the folder until it is closed or the process dies."""
    import fcntl  # not on Windows, where the rest of the package works

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _flush_to_disk(path: Path) -> None:
    status = path.lstat()
    # A file with other names has been written by somebody else, who may have many gigabytes of it in memory.
    if path.is_symlink() or (path.is_file() and status.st_nlink > 1):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_link(link: str) -> None:
    """Refuses unknown ways to bring files along.

    Raises:
        ValueError: with the rule, the value and the way out.
    """
    if link not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}; got {link!r}.")


def bring_file(source: Path, target: Path, link: str = "copy", advance: Callable[[int], None] = lambda _: None) -> None:
    """Makes `target` the same file as `source`; `advance` is told the bytes as they are done.

    A symbolic link in the source is followed: what is copied or linked is the file it stands for.

    Raises:
        OSError: if the file cannot be brought that way, such as a hard link to another file system.
    """
    source = source.resolve()
    try:
        if link == "hardlink":
            os.link(source, target)
        elif link == "symlink":
            target.symlink_to(source)
        elif link == "copy" or not _reflink(source, target):
            _copy(source, target, advance)
            return
    except OSError as error:
        if link == "hardlink" and error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise OSError(
                error.errno,
                "link='hardlink' needs source and destination on one file system that has hard links; "
                f"linking {source} failed ({error.strerror}). Use link='symlink' or 'copy'",
            ) from error
        raise
    advance(source.stat().st_size)


def _copy(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(COPY_CHUNK):
            writer.write(chunk)
            advance(len(chunk))


def _reflink(source: Path, target: Path) -> bool:
    """Whether the file system could let `target` share the blocks of `source`; if not, there is no `target`."""
    import fcntl  # not on Windows, where the rest of the package works

    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            return True
        except OSError as error:
            target.unlink()
            if error.errno not in NO_REFLINK:
                raise
            return False
