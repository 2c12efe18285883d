"""Checks of the paths that a command writes to. Every command calls them before it reads or writes anything else."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isocost.errors import ConfigError
from isocost.utils.host import host_name, is_alive

PARTIAL_SUFFIX = ".partial"
FOREIGN_LEFTOVER_S = 7 * 24 * 3600.0
"""Age after which a temporary folder of another machine counts as left over from a killed process."""
_OWNER = re.compile(r"(?:(?P<host>.+)\.)?(?P<pid>[0-9]+)(?:~[^.]*)?")


def check_output_folder(path: str | Path, *, must_be_new: bool = False) -> Path:
    """Check that a path can be a folder to write into: it is an existing folder, or it can be created.

    Args:
        path: the folder.
        must_be_new: the folder must be absent or empty.

    Returns:
        The path.

    Raises:
        ConfigError: the path is a file, lies below a file, contains a dangling link or a name that is too long, or the folder
            is not empty though it must be.
    """
    folder = Path(path)
    _check_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{_shown(folder)}: this is a file; give a folder")
    if must_be_new and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{_shown(folder)}: not empty; give a new folder")
    return folder


def check_output_file(path: str | Path, suffix: str, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Check that a path can be a file to write.

    Args:
        path: the file. An existing file is replaced.
        suffix: suffix that the name must have, such as ".png".
        inputs: files that the command reads and must not replace.

    Returns:
        The path.

    Raises:
        ConfigError: the path has another suffix, is a folder or an input, lies below a file, or contains a dangling link or a
            name that is too long.
    """
    file = Path(path)
    if file.suffix.lower() != suffix:
        raise ConfigError(f"{_shown(file)}: give a file that ends in {suffix}")
    _check_path(file)
    if file.exists() and not file.is_file():
        raise ConfigError(f"{_shown(file)}: this is not a file; give a file that ends in {suffix}")
    for source in inputs:
        if file.exists() and Path(source).exists() and file.samefile(source):
            raise ConfigError(f"{_shown(file)}: this is the input itself; give another file to write")
    return file


def check_separate(target: str | Path, *sources: str | Path) -> None:
    """Check that a folder to write into does not overlap with the folders that are read. Links are followed.

    Raises:
        ConfigError: the target is a source, lies in one, or contains one.
    """
    destination = Path(target).resolve()
    ids = _ids_of_parents(destination)
    own_id = _id_of(destination) if destination.exists() else None
    for source in map(Path, sources):
        if not source.exists():
            continue
        if own_id == _id_of(source):
            raise ConfigError(f"{_shown(target)}: this is {_shown(source)} itself; give another folder to write into")
        if _id_of(source) in ids:
            raise ConfigError(f"{_shown(target)}: lies inside {_shown(source)}, which is read; give a folder outside it")
        if own_id in _ids_of_parents(source.resolve()):
            raise ConfigError(f"{_shown(target)}: contains {_shown(source)}, which is read; give another folder to write into")


@contextmanager
def private_folder(final: Path) -> Iterator[Path]:
    """A new empty folder next to `final`, for this attempt only; it is removed at the end of the block if it still exists.

    Folders that killed processes left there for the same `final` are removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name[:40]}{PARTIAL_SUFFIX}."  # a whole name could become too long
    remove_leftovers(final.parent, re.escape(prefix))
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{host_name()}.{os.getpid()}~", dir=final.parent))
    folder.chmod(0o777 & ~_umask())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove the files and folders of killed processes, named PREFIX + HOST.PID or PREFIX + PID. Anything else stays.

    A leftover of this machine is removed when its process has ended, one of another machine when it is a week old.

    Args:
        folder: where to look; it need not exist.
        prefix: regular expression of the start of the names.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        start = re.match(prefix, path.name)
        owner = None if start is None else _OWNER.fullmatch(path.name, start.end())
        if owner is None or path.is_symlink():
            continue
        try:
            is_old = time.time() - path.stat().st_mtime > FOREIGN_LEFTOVER_S
        except FileNotFoundError:  # its owner has just removed it
            continue
        is_leftover = not is_alive(int(owner["pid"])) if owner["host"] in (None, host_name()) else is_old
        if is_leftover and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif is_leftover:
            path.unlink(missing_ok=True)


def os_error_message(error: OSError) -> str:
    """One line for an error of the operating system: the file, the reason, and a remedy if one is known."""
    file = f"{_shown(Path(os.fsdecode(error.filename)))}: " if isinstance(error.filename, str | bytes) else ""
    reason = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
    return f"{file}{reason}{_REMEDIES.get(error.errno or 0, '')}"


_REMEDIES = {
    errno.ENOSPC: "; free some disk space, then run the same command again",
    errno.EDQUOT: "; free some of your disk quota, then run the same command again",
    errno.EFBIG: "; raise the limit of file sizes (ulimit -f), or give a folder on another disk",
    errno.EROFS: "; give a folder on a writable disk",
    errno.EACCES: "; change its permissions, or give another path",
    errno.EPERM: "; change its permissions, or give another path",
    errno.ENAMETOOLONG: "; give a shorter path",
    errno.ENOTDIR: "; a part of this path is a file: give another path",
    errno.ELOOP: "; a link of this path points to itself: give another path",
    errno.EIO: "; the disk failed: check it, then run the same command again",
    errno.EMFILE: "; raise the limit of open files (ulimit -n)",
    errno.ENFILE: "; the system has too many open files: end other programs, then run the same command again",
    errno.ESTALE: "; the server of this folder was restarted: mount it again, then run the same command again",
    errno.ENOTCONN: "; the server of this folder is not connected: mount it again, then run the same command again",
    errno.ENXIO: "; this is a device or a pipe without a reader: give another path",
}
WRONG_PATH_ERRORS = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR})
"""Error numbers of a path that was given wrongly, in contrast to a disk that failed."""


def _check_path(path: Path) -> None:
    """Raise ConfigError if `path` cannot exist or be created because of its parts."""
    if "\0" in str(path):
        raise ConfigError(f"{_shown(path)}: contains a null byte; give another path")
    for part in (*reversed(path.parents), path):
        try:
            is_dangling = part.is_symlink() and not part.exists()
            is_file_above = part != path and part.exists() and not part.is_dir()
        except OSError as error:
            raise ConfigError(
                f"{_shown(path)}: cannot be written ({os_error_message(OSError(error.errno, error.strerror))})"
            ) from error
        if is_dangling:
            raise ConfigError(f"{_shown(part)}: a link to {_shown(os.readlink(part))}, which does not exist; give another path")
        if is_file_above:
            raise ConfigError(f"{_shown(path)}: {_shown(part)} is a file, so it cannot contain files; give another path")


def _shown(path: str | Path) -> str:
    """A path in one line for messages: characters that cannot be printed are escapes, and the middle of a long path is cut."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(path))
    return text if len(text) <= 200 else f"{text[:120]}...{text[-40:]}"


def _id_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _ids_of_parents(path: Path) -> set[tuple[int, int]]:
    """The existing folders above a resolved path, by device and inode."""
    return {_id_of(parent) for parent in path.parents if parent.exists()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
