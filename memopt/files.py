"""Files written whole or not at all, also when the process is killed half way."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomic(path: str | Path, text: str) -> None:
    """Put text at `path`: readers see the old file or the new, never a part, and a kill leaves nothing behind.

    The text goes to a file without a name first (O_TMPFILE), which the kernel forgets when the process dies. Where a
    file system has no such thing, it is a file beside the target. Raises OSError as `open` does.
    """
    path = Path(path)
    handle, name = _unnamed(path)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
            if not name.exists():  # a name takes microseconds; what is left to a kill is the write itself
                # src_dir_fd, unread for an absolute path, makes Python call linkat, which follows the link
                os.link(f"/proc/self/fd/{out.fileno()}", name, src_dir_fd=out.fileno(), follow_symlinks=True)
        name.replace(path)
    except BaseException:  # also on Ctrl-C: nothing may stay behind
        with suppress(FileNotFoundError):
            name.unlink()
        raise


def _unnamed(path: Path) -> tuple[int, Path]:
    """An open file without a name, and the name it may get; or an open file of that name."""
    try:
        handle = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        return handle, path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    except (AttributeError, OSError):  # not Linux, or a file system without it; a missing folder fails again below
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    Path(name).chmod(0o666 & ~_umask())  # mkstemp's 0600 would keep the file from other users of a shared folder
    return handle, Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
