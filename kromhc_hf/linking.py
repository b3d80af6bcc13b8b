"""How weight files that do not change get from one checkpoint folder into another: by copy, by link or by reflink."""

import errno
import os
from collections.abc import Callable
from pathlib import Path


LINKS = ("copy", "hardlink", "symlink", "reflink-if-possible")
COPY_CHUNK = 16 * 2**20
# The request of linux/fs.h that makes a file share the blocks of another one until either is written to.
FICLONE = 0x40049409
NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


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
