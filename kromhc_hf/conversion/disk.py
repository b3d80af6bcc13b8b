"""A new folder that appears all at once, and files of another one brought into it as copies or links."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


try:
    import fcntl as _fcntl
except ImportError:  # on Windows
    fcntl: Any = None
else:
    fcntl = _fcntl

LINKS = ("copy", "hardlink", "symlink", "reflink-if-possible")
COPY_CHUNK = 16 * 2**20
# Lists what a folder is about to move out.
MOVED = ".moved.json"
# The request of linux/fs.h that makes a file share the blocks of another one until either is written to.
FICLONE = 0x40049409
NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block succeeds, and is gone when it fails.

    What is in it is flushed to disk first. A destination that does not exist appears in one rename of the folder beside
    it. One that exists and is empty may be a mount, a link or where somebody's shell is, and has rights of its own: it
    stays, and gets the files one by one from a folder inside it, config.json last. When the process dies, no half of
    the destination stays: what it left behind is removed by the next one with the same destination.

    Raises:
        FileExistsError: if the destination exists and is not an empty folder, or another process is making it.
        OSError: if the destination cannot be written, or its disk is full.
    """
    given, destination = destination, real_path(destination)
    fill = destination.is_dir()
    if fill:
        # What a dead process moved there is in the way until it is taken back.
        _remove_leftovers(destination, destination)
    _check_free(given, destination)
    home = destination if fill else destination.parent
    folder = home / f".{destination.name}.partial-{os.urandom(4).hex()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination, home)
        folder.mkdir()
        lock = _lock(folder)
    except OSError as error:
        if error.errno is None:
            raise  # with words of our own
        raise OSError(
            error.errno,
            f"destination must be in a folder that can be written to; making {destination} failed "
            f"({error.strerror}). Choose another destination",
        ) from error
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _flush_to_disk(path)
        _check_free(given, destination)
        if fill:
            _move_out(folder)
        else:
            folder.rename(destination)
        _flush_to_disk(home)
    except BaseException as error:
        _take_back(folder)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"destination must have room for the checkpoint; writing {destination} failed ({error.strerror}) and "
                "nothing was left behind. Free some space, choose another destination, or use link='hardlink' or "
                "'symlink', which take no space for the base's weights",
            ) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def real_path(destination: Path) -> Path:
    """A destination by its own name, where it is given as `.`, by a link or the like."""
    return Path(os.path.realpath(destination))


def _check_free(given: Path, destination: Path) -> None:
    if given.is_symlink() and not destination.exists():
        what = f"is a link to {destination}, which does not exist"
    elif os.path.lexists(destination) and not destination.is_dir():
        what = "is a file"
    elif destination.is_dir() and any(not _is_partial(path, destination) for path in destination.iterdir()):
        what = "is not empty"
    else:
        return
    raise FileExistsError(
        f"destination must not exist or be an empty folder; {given} {what}. "
        "Choose another destination, or remove it first."
    )


def _is_partial(path: Path, destination: Path) -> bool:
    """Whether the path is a folder that is to become, or fill, the destination."""
    pattern = re.escape(f".{destination.name}.partial-") + "[0-9a-f]{8}"
    return re.fullmatch(pattern, path.name) is not None and path.is_dir()


def _remove_leftovers(destination: Path, home: Path) -> None:
    """Removes what dead processes began; a live one holds the lock of its folder."""
    for leftover in [path for path in home.iterdir() if _is_partial(path, destination)]:
        try:
            lock = _lock(leftover)
        except BlockingIOError:
            raise FileExistsError(
                f"destination must be made by one process at a time; another one is writing {destination} "
                f"(in {leftover}). Wait for it, or choose another destination."
            ) from None
        # Without locks nobody can tell whether its process lives.
        if lock is not None:
            os.close(lock)
            _take_back(leftover)


def _move_out(folder: Path) -> None:
    """Moves what is in a folder to the folder around it, config.json last, and removes it."""
    # Without config.json it is no checkpoint yet.
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == "config.json", name))
    (folder / MOVED).write_text(json.dumps(names), encoding="utf-8")
    _flush_to_disk(folder / MOVED)
    for name in names:
        (folder / name).rename(folder.parent / name)
    (folder / MOVED).unlink()
    folder.rmdir()


def _take_back(folder: Path) -> None:
    """Removes a folder that a conversion did not finish, and what it has moved out already."""
    moved = folder / MOVED
    unfinished = moved.is_file() and any(path != moved for path in folder.iterdir())
    for name in json.loads(moved.read_text(encoding="utf-8")) if unfinished else ():
        path = folder.parent / name
        # What is still in the folder was not moved, so one by its name beside it is somebody else's.
        if os.path.lexists(folder / name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds an exclusive lock on the folder until it is closed or the process dies; None without."""
    if fcntl is None:
        return None
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
    # Windows opens no folders, and flushes what may be written to.
    if path.is_dir() and fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY if fcntl is not None else os.O_RDWR)
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
        if link == "symlink" and error.errno in (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(
                error.errno,
                "link='symlink' needs a file system that has symbolic links, and on Windows the right to make them; "
                f"pointing at {source} failed ({error.strerror}). Use link='copy'",
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
    if fcntl is None:
        return False
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
            return True
        except OSError as error:
            target.unlink()
            if error.errno not in NO_REFLINK:
                raise
            return False
