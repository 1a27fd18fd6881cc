"""The files of a run: written whole or not at all, read without running anything that is in them."""
import json
import os
import warnings
from dataclasses import asdict, fields

import torch

from model import ROPE_CONTEXT, GPT, GPTConfig

# what train.py needs of a checkpoint to go on with a run
TO_RESUME = ('model', 'config', 'settings', 'meta', 'step', 'best_val_loss', 'optimizers', 'scaler',
             'interval', 'seconds')
RUN_FILES = ('ckpt.pt', 'best.pt', 'metrics.jsonl', 'config.json')
# settings that, like the model's flags, cannot change in the middle of a run
FIXED = ('dataset', 'seed', 'batch_size', 'gradient_accumulation_steps', 'optimizer')


def save(path, state):
    """Write `state` (tensors, numbers, strings and containers of those) to path, replacing it in one step."""
    part = f'{path}.part'
    with open(part, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())  # a rename may reach the disk before the bytes do
    os.replace(part, path)


def load(path, needed=('model', 'config', 'settings', 'meta', 'step')):
    """What `save` wrote, on the CPU. FileNotFoundError or ValueError, one sentence, when that cannot be."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} does not exist: train a model into that out_dir first, '
                                'or name another')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            state = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise anything, and what torch advises is to trust them
        raise ValueError(f'{path} is damaged, or holds more than tensors and plain values '
                         f'({type(error).__name__}): use another checkpoint, or train again') from None
    missing = [name for name in needed if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f'{path} lacks {", ".join(missing)}, which this needs: use a checkpoint of '
                         'train.py, and to resume the one that it calls ckpt.pt')
    return state


def contents(model, **rest):
    """The dict that `save` writes and `build` understands."""
    return {'model': model.state_dict(), 'config': asdict(model.config), **rest}


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
    config = GPTConfig(**(state['config'] | model_args))
    now = {name: settings[name] for name in FIXED} | asdict(config)
    changed = [f'{name} (checkpoint {before[name]!r}, now {now[name]!r} by {given[name]})'
               for name in now if name in given and name in before and now[name] != before[name]]
    if changed:
        raise ValueError(f'a resumed run must keep what it began with: {"; ".join(changed)}; '
                         'leave that out, or start a new run in another out_dir')


def check_device(device):
    """ValueError, one sentence, for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f'device={device} must be one that this machine has: try --device=auto') from None


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
