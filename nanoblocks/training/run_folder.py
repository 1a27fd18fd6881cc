"""The folder of one run: which files it has, whether it can be resumed, how a killed run is repaired."""
import atexit
import errno
import json
import os
import re
import shlex
import shutil
import sys
from contextlib import suppress
from difflib import get_close_matches
from glob import escape, glob

from nanoblocks.files import Lock, flush_file, flush_folder, replace_file, write_json
from nanoblocks.training import checkpoint


class RunFolder:
    """
    ckpt.pt         newest checkpoint
    ckpt.prev.pt    the checkpoint before it, used if the newest is damaged
    best.pt         weights with the lowest validation loss, for sampling
    ckpt.120.pt     the checkpoint of step 120, kept for keep_newest or keep_every
    ckpt.120.shards the shards of a checkpoint, a folder (see shards.py)
    metrics.jsonl   one line per log step and per evaluation
    config.json     model flags and settings
    .lock           locked by the run that writes here
    """
    keep_newest, keep_every = 0, None

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.newest, self.previous, self.best, self.metrics, self.config = self.files = [
            os.path.join(path, name)
            for name in ('ckpt.pt', 'ckpt.prev.pt', 'best.pt', 'metrics.jsonl', 'config.json')]
        self.lock = None
        self.asked = None   # the step of the checkpoint that was asked for, if one was
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
        return bool(self.kept()) or any(os.path.exists(path) for path in self.files if path != self.config)

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
        for path in self.kept().values():
            os.remove(path)
        self.sweep()

    def kept(self) -> dict:
        """{step: path} of the checkpoints that are kept under their steps, in the order of these."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else ()
        steps = sorted(int(found[1]) for found in (re.fullmatch(r'ckpt\.(\d+)\.pt', name) for name in names)
                       if found)
        return {step: self.name_of(step) for step in steps}

    def name_of(self, step):
        return os.path.join(self.path, f'ckpt.{step}.pt')

    def load(self, step: int | None = None) -> tuple[dict, str, str]:
        """
        The checkpoint of a step, its path and its checksum; without a step as `load_newest`. ValueError if
        there is none of that step.
        """
        if step is None:
            return self.load_newest()
        found = self.kept() | {checkpoint.step_of(path): path for path in (self.previous, self.newest)}
        found.pop(None, None)  # of files that are not there
        if step not in found:
            refuse_misspelt(self.path)
            steps = ', '.join(map(str, sorted(found))) or 'none'
            raise ValueError(f'step={step} must be the step of a checkpoint in {self.path} ({steps}): choose '
                             'one of these; keep_newest and keep_every of a run say which are kept')
        state, digest = checkpoint.load_verified(found[step], checkpoint.RESUME_KEYS)
        self.asked = step
        return state, found[step], digest

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

    def write(self, path: str, state: dict) -> None:
        """
        Write a checkpoint in the place of the one before, which, of the newest, becomes the previous one.
        Then those go that are not to be kept. OSError if it cannot be written.
        """
        checkpoint.save(path, state, previous=self.previous if path == self.newest else None)
        if path == self.newest:
            self.keep(state['step'])
        self.sweep()

    def keep(self, step: int) -> None:
        """Keep the newest checkpoint under its step too, and remove those that the settings do not keep."""
        every = self.keep_every
        if self.keep_newest or every and step % every == 0:
            link_or_copy(self.newest, self.name_of(step))
        if self.keep_newest:
            # later ones are of a run that was begun again at this step: it comes to them
            steps = [kept for kept in self.kept() if kept <= step]
            for old in steps[:-self.keep_newest]:
                if not (every and old % every == 0):
                    with suppress(OSError):
                        os.remove(self.name_of(old))

    def sweep(self) -> None:
        """Remove the shards that no checkpoint in the folder names, if all can be read."""
        folders = glob(os.path.join(escape(self.path), '*.shards*'))
        if folders:
            named = [checkpoint.shards_of(path) for path in glob(os.path.join(escape(self.path), '*.pt'))]
            for folder in folders:
                if None not in named and os.path.basename(folder) not in named:
                    shutil.rmtree(folder, ignore_errors=True)

    def begin(self, loaded: str | None, state: dict | None, config: dict) -> None:
        """
        Prepare the folder for a run, and write config.json. A resumed run was loaded from the path `loaded`,
        which holds `state`; if `loaded` is None, a new run replaces the one in the folder. ValueError if the
        folder cannot be written.
        """
        self.keep_newest = config['settings']['keep_newest']
        self.keep_every = config['settings']['keep_every']
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
        kept = glob(os.path.join(escape(self.path), 'ckpt.*.pt.part'))
        for part in {*kept, *(f'{path}.part' for path in self.files)}:
            if os.path.exists(part):
                os.remove(part)
        if self.asked is not None and loaded != self.newest:
            self.go_back_to(loaded)
        elif loaded != self.newest:
            if os.path.exists(self.newest):
                damaged = self.free_name('ckpt.damaged', '.pt')
                os.replace(self.newest, damaged)
                print(f'warning: {self.newest} is now {damaged}, in case it can still be read')
            # a save would otherwise move the damaged file over the only good one
            os.replace(loaded, self.newest)
        self.keep(step)     # a kill may have come between the two names
        self.sweep()
        best = checkpoint.step_of(self.best)
        if best is not None and best > step:
            print(f'warning: {self.best} is of step {best}, but the run continues from step {step}: it '
                  'stays until a loss is the lowest again')
        self.rewind_metrics(step, evaluated)

    def go_back_to(self, loaded):
        """Make an older checkpoint the newest. The later ones stay under their steps: none is lost."""
        for path in (self.newest, self.previous):
            step = checkpoint.step_of(path)
            if step is not None and step > self.asked:
                link_or_copy(path, self.name_of(step))
        link_or_copy(loaded, self.newest)
        if os.path.exists(self.previous):
            os.remove(self.previous)
        later = [step for step in self.kept() if step > self.asked]
        print(f'warning: {self.path} keeps the checkpoints of the later steps {", ".join(map(str, later))} '
              'until the run comes to them again; metrics of later steps are dropped')

    def free_name(self, name, suffix=''):
        """The path of a file that does not exist: NAME, NAME2, ..., and the suffix."""
        numbers = ('', *range(2, 1000))
        paths = (os.path.join(self.path, f'{name}{number}{suffix}') for number in numbers)
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


def link_or_copy(path, other):
    """Give a file another name as well. Where the file system has no hard links, the name of a copy."""
    if os.path.exists(other) and os.path.samefile(path, other):
        return  # of two names of one file, rename() would leave both
    part = f'{other}.part'
    with suppress(FileNotFoundError):
        os.remove(part)
    try:
        os.link(path, part)
    except OSError:
        shutil.copyfile(path, part)
        with open(part, 'rb+') as f:
            flush_file(f)
    os.replace(part, other)
    flush_folder(os.path.dirname(other))


def refuse_misspelt(path: str | os.PathLike, setting: str = 'out_dir') -> None:
    """FileNotFoundError if `path` holds no run and a folder in or beside it does, with the nearest name."""
    def runs(folder):
        return [os.path.dirname(file) for file in sorted(glob(os.path.join(escape(folder), '*', 'ckpt.pt')))]
    path = os.path.normpath(path)
    near = get_close_matches(path, runs(path) + runs(os.path.dirname(path)), 1, 0.0)
    if near and not RunFolder(path).exists():
        raise FileNotFoundError(f'{os.path.join(path, "ckpt.pt")} does not exist: did you mean '
                                f'--{setting}={shlex.quote(near[0])}?')
