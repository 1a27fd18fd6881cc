"""Runs of train.py: what they left in their folders, and whether they are the runs that were asked for."""
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from configurator import settings_of
from model import GPTConfig
from nanoblocks.experiments import topics
from nanoblocks.experiments.arms import MODEL, NOT_IDENTIFYING, split
from nanoblocks.files import ROOT


def run_script(script, *words, tell='', every=10.0):
    """
    Run a script of this repository -> what it prints; SystemExit with its last line when it fails. With
    `tell`, its name, the last line of its output so far goes to stderr every few seconds.
    """
    words = [str(word) for word in words]
    with tempfile.TemporaryFile('w+', errors='replace') as out, \
            tempfile.TemporaryFile('w+', errors='replace') as err:
        process = subprocess.Popen([sys.executable, str(ROOT / script), *words], stdout=out, stderr=err,
                                   text=True)
        try:
            while wait(process, every) is None:
                if tell and (line := last_line(out)):
                    topics.tell(f'{tell}: {line}')
        finally:
            process.kill()  # only where this process is interrupted
        if process.returncode:
            reason = last_line(err) or last_line(out) or 'no output'
            raise SystemExit(f'{script} {shlex.join(words)}: {reason}')
        out.seek(0)
        return out.read()


def wait(process, seconds):
    """The exit code of a process; None if it still runs after these seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def last_line(file):
    """The last line of a file that another process may be writing."""
    file.seek(0)
    return (file.read().replace('\r', '\n').strip().splitlines() or [''])[-1].strip()


class Run(NamedTuple):
    """The measurements of one run."""
    steps: int          # at its last evaluation
    finished: bool
    curve: list         # (step, validation loss)
    bpb: float          # bits per byte at the last evaluation
    rate: float         # median tokens per second
    memory: float       # peak memory in bytes, of the process or on the GPU
    seconds: float      # from start to end, with evaluations

    @property
    def loss(self):
        """Validation loss at the last evaluation."""
        return self.curve[-1][1]


def read_lines(path):
    """The lines of a metrics.jsonl, up to one that a kill cut short."""
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_run(folder, max_iters):
    """The Run in a folder; None when it has not begun."""
    path = Path(folder) / 'metrics.jsonl'
    if not path.exists():
        return None
    lines = read_lines(path)
    evaluations = [line for line in lines if 'val_loss' in line]
    rates = [line['tokens_per_s'] for line in lines if line.get('tokens_per_s')]
    memory = [1e9 * line['memory_gb'] for line in lines if line.get('memory_gb')]
    steps = evaluations[-1]['step'] if evaluations else 0
    return Run(steps, steps == max_iters, [(line['step'], or_nan(line['val_loss'])) for line in evaluations],
               or_nan(evaluations[-1].get('val_bpb')) if evaluations else math.nan,
               statistics.median(rates) if rates else math.nan, max(memory, default=math.nan),
               lines[-1]['seconds'] if lines else 0.0)


def or_nan(number):
    """A number of metrics.jsonl, where null stands for one that was not finite."""
    return math.nan if number is None else number


def progress(folder):
    """(step, validation loss) of a run's last evaluation, (0, None) when there is none."""
    path, last = Path(folder) / 'metrics.jsonl', (0, None)
    if path.exists():
        for line in read_lines(path):
            if 'val_loss' in line:
                last = line['step'], or_nan(line['val_loss'])
    return last


def recorded(folder):
    """(model flags, settings) that a run recorded in its config.json."""
    path = Path(folder) / 'config.json'
    try:
        run = json.loads(path.read_text())
        return run['model'], run['settings']
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} does not exist: that run has not begun') from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is no config of a run: remove that folder and train it again') from None


def with_defaults(folder):
    """
    (model flags, settings) of a run: as recorded, and those that an earlier version did not know at their
    defaults, as which it trained.
    """
    model, settings = recorded(folder)
    if MODEL.keys() - model.keys():
        model = as_recorded(GPTConfig(**model)) | model
    defaults = {name: setting.default for name, setting in settings_of(ROOT / 'train.py').items()}
    return model, defaults | settings


def as_recorded(config):
    """The flags as a config.json has them, where a tuple is a list."""
    return json.loads(json.dumps(asdict(config)))


# ----------------------------------------------------------------------------------------------------------
# The guard: compared runs differ in the flags of their comparison, and in nothing else


def check_run(folder, flags):
    """ValueError when the run in a folder was not trained with these flags."""
    model, settings = with_defaults(folder)
    wanted_model, wanted = split(flags)
    # train.py takes these from the dataset, which is a setting (the second where it holds pairs)
    given = {name: model[name] for name in ('vocab_size', 'block_size') if name in model}
    wanted_model = as_recorded(GPTConfig(**(given | wanted_model)))
    for wish, found in ((wanted_model, model), (wanted, settings)):
        for name in wish:
            if name not in NOT_IDENTIFYING and (name not in found or found[name] != wish[name]):
                raise ValueError(f'{folder} must hold a run with {name}={wish[name]}, and its config.json '
                                 f'says {found.get(name)}: remove that folder, or choose another --out_dir')


def check_pair(first, second, names, free=()):
    """
    ValueError unless the runs in two folders differ in all of `names` and in nothing else, apart from values
    that GPTConfig derives from them. `free`: names that --match or --lr_sweep sets, which may differ too.
    """
    runs = [with_defaults(folder) for folder in (first, second)]
    both = [model | {name: value for name, value in settings.items() if name not in NOT_IDENTIFYING}
            for model, settings in runs]
    differ = [name for name in both[0] | both[1] if both[0].get(name) != both[1].get(name)]
    for name in names:
        if name not in differ:
            raise ValueError(f'{name} must differ between {first} and {second}, and is '
                             f'{both[0].get(name)} in both: the flag was not applied')
    extra = [name for name in differ if name not in names and name not in free]
    derived = [name for name in extra if name in MODEL and MODEL[name].default is None]
    for name in extra:
        if name not in derived:
            raise ValueError(f'{first} and {second} must differ in {", ".join(names)} alone, and differ in '
                             f'{name} too ({both[0].get(name)}, {both[1].get(name)})')
    # a flag left at None must have been filled in with the value that follows from the others
    for folder, (model, _) in zip((first, second), runs):
        follows = as_recorded(GPTConfig(**(model | dict.fromkeys(derived))))
        wrong = [name for name in derived if follows[name] != model[name]]
        if wrong:
            raise ValueError(f'{first} and {second} must differ in {", ".join(names)} alone, and '
                             f'{wrong[0]}={model[wrong[0]]} in {folder} does not follow from that')
