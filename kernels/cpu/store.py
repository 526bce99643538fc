"""Object code on disk, so that a process need not compile what another one of this user has.

A file is named after a hash of all that its code follows from, and begins with a hash of its name
and its code. So it is never out of date, and one that was cut off or damaged is not used. It is
machine code that will be run: files and folders that somebody else may have written are not used.
Whatever goes wrong here, the code is compiled as if there were no file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

SUFFIX = ".kernel"
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
"""To open a file by, and not what it links to; what it says, on Windows."""
LIMIT = 1024
"""Files, of 2 to 20 kilobytes. The oldest go first."""


def stored(source: str, compiled: Callable[[], bytes]) -> bytes:
    """What `compiled` returns, from disk where it is there.

    Args:
        source: all that the code follows from.
        compiled: makes it anew.
    """
    folder = _folder()
    if folder is None:
        return compiled()
    file = folder / (sha256(source.encode()).hexdigest() + SUFFIX)
    code = _read(file)
    if code is None:
        code = compiled()
        _write(file, code)
    return code


def _folder() -> Path | None:
    """Where files go: what FUSEDREG_CACHE says, else the user's folder for such things, or None."""
    chosen = os.environ.get("FUSEDREG_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen not in ("", "0") else None
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        parent = os.path.join(home, "Library", "Caches")
    else:
        parent = os.environ.get("XDG_CACHE_HOME", "")
        parent = parent if os.path.isabs(parent) else os.path.join(home, ".cache")
    return Path(parent, "fusedreg") if os.path.isabs(parent) else None


def _read(file: Path) -> bytes | None:
    """The code in a file; None where it is not there, not whole, or not only ours to write."""
    try:
        if not _is_private(os.stat(file.parent)):
            return None
        with open(os.open(file, os.O_RDONLY | NO_LINK), "rb") as opened:
            if not _is_private(os.fstat(opened.fileno())):
                return None
            content = opened.read()
    except OSError:
        return None
    code = content[len(_seal(file, b"")) :]
    return code if code and content == _seal(file, code) + code else None


def _write(file: Path, code: bytes) -> None:
    """Keep code in a file, which appears whole or not at all."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(os.stat(file.parent)):
            return
        handle, name = tempfile.mkstemp(suffix=SUFFIX, dir=file.parent)  # nobody else's to read
        try:
            with open(handle, "wb") as opened:
                opened.write(_seal(file, code) + code)
            os.replace(name, file)
        except BaseException:  # nothing half written stays
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        _forget_oldest(file.parent)


def _is_private(status: os.stat_result) -> bool:
    """Whether nobody else can have written a file or folder. Windows keeps a user's to itself."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _seal(file: Path, code: bytes) -> bytes:
    """What a file begins with."""
    return sha256(file.name.encode() + code).digest()


def _forget_oldest(folder: Path) -> None:
    """Leave LIMIT files, of those that have our names."""
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    for file in files[:-LIMIT]:
        file.unlink(missing_ok=True)
