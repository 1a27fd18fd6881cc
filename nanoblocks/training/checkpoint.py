"""The files of a run: written whole or not at all, read without running anything that is in them."""
import errno
import hashlib
import json
import os
import random
import sys
import warnings
from dataclasses import asdict, fields

import numpy as np
import torch

from model import GPT, ROPE_CONTEXT, GPTConfig
from nanoblocks.files import flush_folder
from nanoblocks.training.optim import whole

# what train.py needs of a checkpoint to go on with a run
TO_RESUME = ('model', 'config', 'settings', 'meta', 'step', 'micro_done', 'evaluated', 'best_val_loss',
             'optimizers', 'scaler', 'ema', 'generators', 'tally', 'losses', 'seconds', 'wandb_id')
NEWEST, PREVIOUS = 'ckpt.pt', 'ckpt.prev.pt'
RUN_FILES = (NEWEST, PREVIOUS, 'best.pt', 'metrics.jsonl', 'config.json')
# settings that, like the model's flags, cannot change in the middle of a run; datasets compare by their meta
FIXED = ('seed', 'batch_size', 'gradient_accumulation_steps', 'batch_tokens', 'batch_warmup_iters',
         'optimizer')


class Damaged(ValueError):
    """A file that is not what was written."""


def save(path, state, keep=None):
    """
    Write `state` (tensors, numbers, strings and containers of those) to path, replacing it in one step: at
    any moment there is one whole file of that name, or under `keep`, where the one before goes. OSError if
    that cannot be, and then nothing has changed.

    The file is what torch.save writes, a zip archive, with a hash of all its bytes as the archive's comment.
    """
    part = f'{path}.part'
    try:
        with open(part, 'wb') as f:
            sealed = Sealed(f)
            try:
                torch.save(state, sealed)
            except RuntimeError as error:  # torch's own words for a failed write
                raise sealed.error or OSError(errno.EIO, str(error).split('\n')[0]) from None
            sealed.seal()
            f.flush()
            os.fsync(f.fileno())  # a rename may reach the disk before the bytes do
        if keep and os.path.exists(path):
            keep_as(path, keep)
        os.replace(part, path)
        flush_folder(os.path.dirname(path))
    except OSError:
        if os.path.exists(part):
            os.remove(part)  # where it is the disk that is full
        raise


class Sealed:
    """
    A file whose bytes are hashed as they pass. The checksums of zip do not cover its directory, where one bit
    can make torch.load take a record for a folder, and return whatever was in memory.
    """
    mark = b'sha256:'
    size = len(mark) + 64

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()

    def seal(self):
        # an archive ends with the length of its comment, and the comment
        self.file.seek(-2, os.SEEK_END)
        self.file.write(self.size.to_bytes(2, 'little') + self.mark + self.digest.hexdigest().encode())

    @classmethod
    def check(cls, path):
        """ValueError when the bytes are not those that were sealed. What torch.save wrote alone may pass."""
        left = max(0, os.path.getsize(path) - cls.size)
        digest = hashlib.sha256()
        with open(path, 'rb') as f:
            while left > 2:
                left -= len(piece := f.read(min(left - 2, 1 << 20)))
                digest.update(piece)
            digest.update(bytes(2))
            length, comment = f.read(left), f.read()
        if comment != cls.mark + digest.hexdigest().encode():
            end = (length + comment)[-22:]
            if end[:4] != b'PK\5\6' or end[-2:] != bytes(2):
                raise ValueError('wrong checksum')


def keep_as(path, keep):
    """Give a file a second name, so that the first is never without one."""
    try:
        os.link(path, f'{keep}.part')
        os.replace(f'{keep}.part', keep)
    except OSError:  # a file system without second names
        os.replace(path, keep)


def load(path, needed=('model', 'config', 'settings', 'meta', 'step')):
    """
    What `save` wrote, on the CPU, checked against its hash. FileNotFoundError, Damaged or ValueError, one
    sentence, when that cannot be.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} does not exist: train a model into that out_dir first, '
                                'or name another')
    try:
        Sealed.check(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            state = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise anything, and what torch advises is to trust them
        raise Damaged(f'{path} is damaged, or holds more than tensors and plain values '
                      f'({type(error).__name__}): use another checkpoint, or train again') from None
    missing = [name for name in needed if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f'{path} lacks {", ".join(missing)}, which this needs: use a checkpoint of '
                         'train.py, and to resume the one that it calls ckpt.pt')
    return state


def load_newest(out_dir):
    """
    The newest checkpoint of a run from which it can go on, and its path: the previous one, with a warning,
    when the newest is damaged or gone. FileNotFoundError or ValueError, one sentence, when there is none.
    """
    path, previous = (os.path.join(out_dir, name) for name in (NEWEST, PREVIOUS))
    try:
        return load(path, TO_RESUME), path
    except (FileNotFoundError, Damaged) as error:
        if not os.path.isfile(previous):
            raise
        try:
            state = load(previous, TO_RESUME)
        except ValueError:
            raise error from None
        print(f'{error}\nwarning: going on from {previous} instead, at step {state["step"]}', file=sys.stderr)
        return state, previous


def settle(out_dir, path):
    """Tidy up after a run that was killed: what was loaded becomes the newest, half-written files go."""
    newest = os.path.join(out_dir, NEWEST)
    if path != newest:
        # before a save could move the damaged one over it
        os.replace(path, newest)
    for name in os.listdir(out_dir):
        if name.endswith('.part') and name.removesuffix('.part') in RUN_FILES:
            os.remove(os.path.join(out_dir, name))


def contents(model, keep=True, **rest):
    """The dict that `save` writes and `build` understands; `keep`: see optim.whole."""
    named = model.state_dict(keep_vars=True)
    # tied weights are gathered, and saved, once
    gathered = {id(tensor): whole(tensor, keep) for tensor in named.values()}
    weights = {name: gathered[id(tensor)] for name, tensor in named.items()}
    return {'model': weights, 'config': asdict(model.config), **rest}


def generators():
    """The states of all random generators, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    states = {'torch': torch.get_rng_state(), 'python': random.getstate(),
              'numpy': (kind, torch.from_numpy(keys.copy()), *rest)}
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def set_generators(states):
    kind, keys, *rest = states['numpy']
    np.random.set_state((kind, keys.numpy(), *rest))
    random.setstate(states['python'])
    torch.set_rng_state(states['torch'])
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'])


def build(state, path, flags=()):
    """The model of a loaded checkpoint. ValueError, one sentence, when its flags or weights are another's."""
    unknown = sorted(state['config'].keys() - {f.name for f in fields(GPTConfig)})
    if unknown:
        raise ValueError(f'{path} has model flags that this version does not know ({", ".join(unknown)}): '
                         'use the version that wrote it')
    trained, flags = state['config'], dict(flags)
    if flags.get('rope_scaling') in ROPE_CONTEXT:
        # scaled from the context that was trained on, not from the one that is asked for
        flags = {'rope_context': trained['rope_context'] or trained['block_size']} | flags
    model = GPT(GPTConfig(**(trained | flags)), seed=None)
    ours, theirs = model.state_dict(), state['model']
    odd = [name for name in ours.keys() | theirs.keys()
           if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape]
    if odd:
        raise ValueError(f'{path} has weights of another model than its config ({min(odd)} differs): '
                         'use another checkpoint')
    model.load_state_dict(theirs)
    return model


def overrides(trained, config):
    """{name: value} of the flags of a config that differ from those that a model was trained with."""
    return {name: value for name, value in asdict(config).items() if value != trained[name]}


def refuse_contradictions(state, model_args, settings, given):
    """ValueError, one sentence, when the command line wants a model or data other than a run began with."""
    before = {name: state['settings'].get(name) for name in FIXED} | state['config']
    flags = state['config'] | model_args
    try:
        flags = asdict(GPTConfig(**flags))
    except ValueError:
        pass  # flags that do not go together contradict the checkpoint, which is what is said
    now = {name: settings[name] for name in FIXED} | flags
    changed = [f'{name} (checkpoint {before[name]!r}, now {now[name]!r} by {given[name]})'
               for name in now if name in given and name in before and now[name] != before[name]]
    if changed:
        raise ValueError(f'a resumed run must keep what it began with: {"; ".join(changed)}; '
                         'leave that out, or start a new run in another out_dir')


def claim(out_dir):
    """Make the folder of a run. ValueError, one sentence, where there can be none."""
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(f'out_dir={out_dir} must be a folder that can be made ({error.strerror}): '
                         'choose another') from None


def found(out_dir):
    """Whether a folder holds a run that could be lost."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in RUN_FILES)


def can_resume(out_dir):
    """Whether a folder holds a checkpoint to go on from, damaged or not."""
    return any(os.path.exists(os.path.join(out_dir, name)) for name in (NEWEST, PREVIOUS))


def clear(out_dir):
    """Remove the run that a folder holds."""
    for name in RUN_FILES:
        if os.path.exists(os.path.join(out_dir, name)):
            os.remove(os.path.join(out_dir, name))


def rewind_metrics(path, step):
    """Drop what a killed run wrote to metrics.jsonl after its checkpoint, and a last line cut short."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as f:
        for line in f:
            try:
                if json.loads(line)['step'] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break
    with open(f'{path}.part', 'w') as f:
        f.writelines(kept)
    os.replace(f'{path}.part', path)
