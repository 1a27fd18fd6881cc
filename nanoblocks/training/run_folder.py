"""The folder of one run: which files it has, whether it can be resumed, how a killed run is repaired."""
import atexit
import errno
import json
import os
import shlex
import sys
import time
from difflib import get_close_matches
from glob import escape, glob

from nanoblocks.files import Lock, replace_file, write_json
from nanoblocks.training import checkpoint, parallel


class RunFolder:
    """
    ckpt.pt         newest checkpoint
    ckpt.prev.pt    the checkpoint before it, used if the newest is damaged
    best.pt         weights with the lowest validation loss, for sampling
    metrics.jsonl   one line per log step and per evaluation
    config.json     model flags and settings
    .lock           locked by the run that writes here
    """
    waits = (1, 2, 4)  # seconds before each further attempt to write the last checkpoint

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.newest, self.previous, self.best, self.metrics, self.config = self.files = [
            os.path.join(path, name)
            for name in ('ckpt.pt', 'ckpt.prev.pt', 'best.pt', 'metrics.jsonl', 'config.json')]
        self.lock = None
        self.found = self.stamps()

    def stamps(self):
        """What tells whether another run has written here: inode, size and time of every file."""
        found = []
        for path in self.files:
            try:
                status = os.stat(path)
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append(None)
        return found

    def exists(self) -> bool:
        """Whether the folder holds files of a run that could be lost; config.json alone is none."""
        return any(os.path.exists(path) for path in self.files if path != self.config)

    def resumable(self) -> bool:
        """Whether the folder holds a checkpoint to resume from, damaged or not."""
        return os.path.exists(self.newest) or os.path.exists(self.previous)

    def create(self) -> None:
        """
        Make the folder, and lock it until this process ends. ValueError if that fails, or if another run
        writes here, or did so since this object was made.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise ValueError(f'out_dir={self.path} must be a folder that can be made ({error.strerror}): '
                             'choose another') from None
        try:
            self.lock = Lock(os.path.join(self.path, '.lock'))
        except BlockingIOError:
            raise ValueError(f'out_dir={self.path} must not be in use by another run: stop that one, or wait '
                             'for its end, or choose another folder') from None
        except OSError as error:
            raise self.not_writable(error) from None
        atexit.register(self.release)
        if not self.lock.works:
            print(f'warning: the file system of out_dir={self.path} has no locks: start no second run there')
        if self.stamps() != self.found:
            raise ValueError(f'out_dir={self.path} must not change while a run starts, but another run wrote '
                             'there: start again')

    def release(self) -> None:
        """Let other runs use the folder."""
        lock, self.lock = self.lock, None
        if lock:
            lock.release()

    def not_writable(self, error):
        return ValueError(f'out_dir={self.path} must be a folder that can be written ({error.strerror}): '
                          'make room or change its permissions, or copy it elsewhere and name the copy')

    def refuse_existing(self) -> None:
        """ValueError if a new run would replace the one in the folder."""
        if self.exists():
            resume = 'resume it with --init_from=resume, ' if self.resumable() else 'it has no ckpt.pt, '
            raise ValueError(f'out_dir={self.path} must not hold a run: {resume}'
                             'replace it with --overwrite=True, or choose another folder')

    def delete(self) -> None:
        """Remove the run's files; the folder and all other files stay."""
        for path in self.files:
            if os.path.exists(path):
                os.remove(path)

    def load_newest(self) -> tuple[dict, str, str]:
        """
        The newest checkpoint that can be read, its path and its checksum. If ckpt.pt is damaged or missing,
        this is the previous one, with a warning. FileNotFoundError or ValueError if neither can be read.
        """
        try:
            state, digest = checkpoint.load_verified(self.newest, checkpoint.RESUME_KEYS)
            return state, self.newest, digest
        except (FileNotFoundError, checkpoint.Damaged) as error:
            if not os.path.isfile(self.previous):
                refuse_misspelt(self.path)
                raise
            try:
                state, digest = checkpoint.load_verified(self.previous, checkpoint.RESUME_KEYS)
            except (FileNotFoundError, checkpoint.Damaged):
                raise error from None
            print(f'{error}\nwarning: resuming from {self.previous} instead, at step {state["step"]}',
                  file=sys.stderr)
            return state, self.previous, digest

    def save(self, path: str, state: dict, log, last: bool = False) -> bool:
        """
        Write a checkpoint, in the main process, and before it the pending lines of the log. Returns whether
        that worked; every process must call it. The newest checkpoint becomes the previous one. With `last`,
        a save that fails is tried again after a while, because there will be no later one.
        """
        written = parallel.ranks()[0] > 0
        for wait in (*self.waits, None) if last else (None,):
            if written:
                break
            try:
                # a checkpoint must not reach the disk before the metrics of its steps
                log.flush(to_disk=True)
                checkpoint.save(path, state, previous=self.previous if path == self.newest else None)
                written = True
            except OSError as error:
                then = (f'will be tried again in {wait} s' if wait else 'was tried for the last time' if last
                        else 'training continues, and will try again')
                log.print(f'warning: {path} could not be written ({error.strerror}): the old file is kept; '
                          + then)
                time.sleep(wait or 0)
        return parallel.from_main(written)

    def begin(self, loaded: str | None, state: dict | None, config: dict) -> None:
        """
        Prepare the folder for a run, and write config.json. A resumed run was loaded from the path `loaded`,
        which holds `state`; if `loaded` is None, a new run replaces the one in the folder. ValueError if the
        folder cannot be written.
        """
        try:
            if loaded:
                self.repair(loaded, state['step'], state['evaluated'])
            else:
                self.delete()
        except OSError as error:
            raise self.not_writable(error) from None
        try:
            write_json(self.config, config)
        except OSError as error:
            # as in the middle of a run, a full disk costs nothing as long as there is room in the end
            if not loaded or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self.not_writable(error) from None
            print(f'warning: out_dir={self.path} cannot be written now ({error.strerror}): make room there; '
                  'training continues, and each save is tried')

    def repair(self, loaded: str, step: int, evaluated: int) -> None:
        """
        Clean up after a run that was killed: the checkpoint that was loaded becomes the newest, half-written
        files go, metrics end at its step. A newest one that is thought damaged is kept under another name.
        """
        for path in self.files:
            if os.path.exists(f'{path}.part'):
                os.remove(f'{path}.part')
        if loaded != self.newest:
            if os.path.exists(self.newest):
                damaged = self.free_name('ckpt.damaged')
                os.replace(self.newest, damaged)
                print(f'warning: {self.newest} is now {damaged}, in case it can still be read')
            # a save would otherwise move the damaged file over the only good one
            os.replace(loaded, self.newest)
        best = checkpoint.step_of(self.best)
        if best is not None and best > step:
            print(f'warning: {self.best} is of step {best}, but the run continues from step {step}: it '
                  'stays until a loss is the lowest again')
        self.rewind_metrics(step, evaluated)

    def free_name(self, name):
        """The path of a file that does not exist: NAME.pt, NAME2.pt, ..."""
        numbers = ('', *range(2, 1000))
        paths = (os.path.join(self.path, f'{name}{number}.pt') for number in numbers)
        return next(path for path in paths if not os.path.exists(path))

    def rewind_metrics(self, step: int, evaluated: int) -> None:
        """
        Drop the metrics of steps after `step`, of evaluations after the step `evaluated`, and lines that
        cannot be read, of which it tells unless it is the last, which a kill may cut short.
        """
        if not os.path.exists(self.metrics):
            return
        with open(self.metrics, 'rb') as f:
            lines = f.read().splitlines(keepends=True)
        kept, bad = [], []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if line.endswith(b'\n') and entry['step'] <= (evaluated if 'val_loss' in entry else step):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                bad.append(number)
        bad = [number for number in bad if number < len(lines)]
        if bad:
            print(f'warning: {self.metrics} has lines that cannot be read, which are dropped: '
                  f'{", ".join(map(str, bad))}')
        if kept == lines[:len(kept)]:  # needs no room on a full disk
            os.truncate(self.metrics, sum(map(len, kept)))
        else:
            replace_file(self.metrics, b''.join(kept))


def refuse_misspelt(path: str | os.PathLike, setting: str = 'out_dir') -> None:
    """FileNotFoundError if `path` holds no run and a folder in or beside it does, with the nearest name."""
    def runs(folder):
        return [os.path.dirname(file) for file in sorted(glob(os.path.join(escape(folder), '*', 'ckpt.pt')))]
    path = os.path.normpath(path)
    near = get_close_matches(path, runs(path) + runs(os.path.dirname(path)), 1, 0.0)
    if near and not RunFolder(path).exists():
        raise FileNotFoundError(f'{os.path.join(path, "ckpt.pt")} does not exist: did you mean '
                                f'--{setting}={shlex.quote(near[0])}?')
