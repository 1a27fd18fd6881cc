"""How files are written and folders are locked, by everything that a kill or a full disk must not harm."""
import errno
import json
import os
from contextlib import suppress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


def write_json(path, value):
    """Replace a file in one step: a kill leaves the old file or the new one, never half of one."""
    replace_file(path, json.dumps(value, indent=1).encode())


def replace_file(path, data):
    """Replace the bytes of a file in one step. If that fails, no half of it is left, and the disk as full."""
    part = f'{path}.part'
    try:
        with open(part, 'wb') as f:
            f.write(data)
            flush_file(f)
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


def lock(file):
    """Lock an open file, without waiting. False if another process holds it, None if there are no locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        # others, such as ENOLCK or ENOTSUP: a file system that has no locks
        taken = error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
        return False if taken else None
    return True


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
            locked = lock(self.file)
            if locked is False:
                self.file.close()
                raise BlockingIOError(errno.EAGAIN, 'in use', path)
            if locked is None:
                self.works = False
                return
            # the process before may have removed the file between the two lines, and a third made it again
            with suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(self.file.fileno())):
                    return
            self.file.close()

    def release(self):
        """Give the lock back, and remove its file."""
        if not fcntl:  # Windows removes no open file
            self.file.close()
        with suppress(OSError):
            os.remove(self.path)
        self.file.close()
