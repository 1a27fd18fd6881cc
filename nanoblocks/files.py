"""Atomic writing of small files, locks, the root of this repository and its commit."""
import errno
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

ROOT = Path(__file__).resolve().parents[1]  # the folder of model.py and train.py


def write_json(path, value):
    """Replace a file in one step: a kill leaves the old file or the new one, never half of one."""
    replace_file(path, json.dumps(value, indent=1).encode())


def replace_file(path, data):
    """Replace the bytes of a file in one step. If that fails, no half of it is left, and the disk as full."""
    part = f'{path}.part'
    try:
        with open(part, 'wb') as f:
            f.write(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            os.remove(part)
        raise


def flush_file(file):
    """fsync an open file, where its file system can (some network and FUSE file systems cannot)."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def flush_folder(folder):
    """
    fsync a folder: file names reach the disk separately from file contents. Many file systems cannot do it
    (CIFS, WSL, FUSE), and the files are complete without it: so a failure is none of the caller's.
    """
    if os.name != 'posix':
        return
    with suppress(OSError):
        fd = os.open(folder or '.', os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Lock:
    """
    A lock file. The lock ends with the process that holds it, however that ends; the file may then stay
    behind, and means nothing. BlockingIOError if another process holds the lock, OSError if the file cannot
    be made. `works` is False on a file system that has no locks.
    """

    def __init__(self, path):
        self.path, self.works = path, True
        while True:
            self.file = open(path, 'ab')
            try:
                self.take()
            except OSError as error:
                self.file.close()
                if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                    raise BlockingIOError(errno.EAGAIN, 'in use', path) from None
                self.works = False
                return
            # the process before may have removed the file between the two lines, and a third made it again
            with suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(self.file.fileno())):
                    return
            self.file.close()

    def take(self):
        if fcntl:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)

    def release(self):
        """Give the lock back, and remove its file."""
        if not fcntl:  # Windows removes no open file
            self.file.close()
        with suppress(OSError):
            os.remove(self.path)
        self.file.close()


def git_commit():
    """The commit of this source, with a + if files have changed since; None outside a repository."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--abbrev=40', '--dirty=+', '--exclude=*'],
                                cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
