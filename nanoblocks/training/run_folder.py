"""The folder of one run: which files it has, whether it can be resumed, how a killed run is repaired."""
import json
import os
import sys

from nanoblocks.files import write_json
from nanoblocks.training import checkpoint, parallel


class RunFolder:
    """
    ckpt.pt         newest checkpoint
    ckpt.prev.pt    the checkpoint before it, used if the newest is damaged
    best.pt         weights with the lowest validation loss, for sampling
    metrics.jsonl   one line per log step and per evaluation
    config.json     model flags and settings
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.newest, self.previous, self.best, self.metrics, self.config = self.files = [
            os.path.join(path, name)
            for name in ('ckpt.pt', 'ckpt.prev.pt', 'best.pt', 'metrics.jsonl', 'config.json')]

    def exists(self) -> bool:
        """Whether the folder holds files of a run that could be lost."""
        return any(map(os.path.exists, self.files))

    def resumable(self) -> bool:
        """Whether the folder holds a checkpoint to resume from, damaged or not."""
        return os.path.exists(self.newest) or os.path.exists(self.previous)

    def create(self) -> None:
        """Make the folder. ValueError if that fails."""
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise ValueError(f'out_dir={self.path} must be a folder that can be made ({error.strerror}): '
                             'choose another') from None

    def refuse_existing(self) -> None:
        """ValueError if a new run would replace the one in the folder."""
        if self.exists():
            raise ValueError(f'out_dir={self.path} must not hold a run: resume it with --init_from=resume, '
                             'replace it with --overwrite=True, or choose another folder')

    def delete(self) -> None:
        """Remove the run's files; the folder and all other files stay."""
        for path in self.files:
            if os.path.exists(path):
                os.remove(path)

    def load_newest(self) -> tuple[dict, str]:
        """
        The newest checkpoint that can be read, and its path. If ckpt.pt is damaged or missing, this is the
        previous one, with a warning. FileNotFoundError or ValueError if neither can be read.
        """
        try:
            return checkpoint.load(self.newest, checkpoint.RESUME_KEYS), self.newest
        except (FileNotFoundError, checkpoint.Damaged) as error:
            if not os.path.isfile(self.previous):
                raise
            try:
                state = checkpoint.load(self.previous, checkpoint.RESUME_KEYS)
            except ValueError:
                raise error from None
            print(f'{error}\nwarning: resuming from {self.previous} instead, at step {state["step"]}',
                  file=sys.stderr)
            return state, self.previous

    def save(self, path: str, state: dict, log) -> bool:
        """
        Write a checkpoint, in the main process, and before it the pending lines of the log. Returns whether
        that worked; every process must call it. The newest checkpoint becomes the previous one.
        """
        written = True
        try:
            if parallel.ranks()[0] == 0:
                # a checkpoint must not reach the disk before the metrics of its steps
                log.flush(to_disk=True)
                checkpoint.save(path, state, previous=self.previous if path == self.newest else None)
        except OSError as error:
            log.print(f'warning: {path} could not be written ({error.strerror}): the old file is kept; '
                      'training continues, and will try again')
            written = False
        return parallel.from_main(written)

    def begin(self, loaded: str | None, step: int, config: dict) -> None:
        """
        Prepare the folder for a run, and write config.json. A resumed run was loaded from the path `loaded`
        and continues at `step`; if `loaded` is None, a new run replaces the one in the folder.
        """
        if loaded:
            self.repair(loaded, step)
        else:
            self.delete()
        write_json(self.config, config)

    def repair(self, loaded: str, step: int) -> None:
        """
        Clean up after a run that was killed: the checkpoint that was loaded becomes the newest, half-written
        files go, metrics end at its step.
        """
        if loaded != self.newest:
            # a save would otherwise move the damaged file over the only good one
            os.replace(loaded, self.newest)
        for path in self.files:
            if os.path.exists(f'{path}.part'):
                os.remove(f'{path}.part')
        self.rewind_metrics(step)

    def rewind_metrics(self, step: int) -> None:
        """Drop the metrics of steps after `step`, and a last line that was cut short."""
        if not os.path.exists(self.metrics):
            return
        kept = []
        with open(self.metrics) as f:
            for line in f:
                try:
                    if json.loads(line)['step'] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    break
        with open(f'{self.metrics}.part', 'w') as f:
            f.writelines(kept)
        os.replace(f'{self.metrics}.part', self.metrics)
