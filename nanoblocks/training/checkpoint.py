"""Checkpoints: written atomically, verified by a checksum, read without running any code in them."""
import errno
import hashlib
import os
import random
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields

import numpy as np
import torch

from model import GPT, ROPE_CONTEXT, GPTConfig, with_fixed_norm
from nanoblocks.files import flush_file, flush_folder
from nanoblocks.formats import first_line

SAMPLE_KEYS = ('model', 'config', 'settings', 'meta', 'step')
RESUME_KEYS = (*SAMPLE_KEYS, 'micro_done', 'evaluated', 'best_val_loss', 'optimizers', 'scaler', 'ema',
               'generators', 'tally', 'losses', 'seconds', 'wandb_id')


class Damaged(ValueError):
    """The bytes of a file do not match its checksum, or cannot be read as a checkpoint."""


def save(path: str, state: dict, previous: str | None = None) -> None:
    """
    Write `state` (tensors, numbers, strings and containers of them) to path, in one step. The file that was
    there moves to `previous`, if that is given. At every moment a complete file stands under path or under
    `previous`. OSError if writing fails; then nothing has changed.

    The file is the zip archive of torch.save, with the checksum of its bytes as the archive's comment. The
    checksums that torch.save could put inside would take as long again, and cover less.
    """
    part = f'{path}.part'
    try:
        with open(part, 'wb') as f:
            hashed = HashedFile(f)
            try:
                with without_inner_checksums():
                    torch.save(state, hashed)
            except RuntimeError as error:  # how torch reports a failed write
                raise hashed.error or OSError(errno.EIO, str(error).split('\n')[0]) from None
            hashed.append_checksum()
            flush_file(f)  # or the rename may reach the disk before the bytes
        if previous and os.path.exists(path):
            link_or_move(path, previous)
        os.replace(part, path)
        flush_folder(os.path.dirname(path))
    except OSError:
        with suppress(OSError):
            os.remove(part)  # the disk may be full: give the space back
        raise


@contextmanager
def without_inner_checksums():
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class Checksum:
    """
    The SHA-256 of the CRC-32s of a file's pieces of 1 MiB, with the methods of hashlib. A third of the time
    of a SHA-256 of all bytes, and as good against accidents, though not against intent.
    """
    piece = 1 << 20

    def __init__(self):
        self.digest, self.crc, self.left = hashlib.sha256(), 0, self.piece

    def update(self, data):
        data = memoryview(data)
        while len(data):
            part, data = data[:self.left], data[self.left:]
            self.crc, self.left = zlib.crc32(part, self.crc), self.left - len(part)
            if not self.left:
                self.digest.update(self.crc.to_bytes(4, 'little'))
                self.crc, self.left = 0, self.piece

    def hexdigest(self):
        digest = self.digest.copy()
        if self.left < self.piece:
            digest.update(self.crc.to_bytes(4, 'little'))
        return digest.hexdigest()


class HashedFile:
    """
    A file that hashes the bytes written to it. The checksums inside a zip archive do not cover its directory,
    where one wrong bit can make torch.load skip a record and return uninitialised memory.
    """
    mark, old_mark = b'crc32s:', b'sha256:'  # before the checksum; old: of files that are hashed with SHA-256
    size = len(mark) + 64

    def __init__(self, file):
        self.file, self.checksum, self.error = file, Checksum(), None

    def write(self, data):
        self.checksum.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()

    def append_checksum(self):
        # an archive ends with the length of its comment, and the comment
        self.file.seek(-2, os.SEEK_END)
        self.file.write(self.size.to_bytes(2, 'little') + self.mark + self.checksum.hexdigest().encode())

    @classmethod
    def check(cls, path):
        """
        (checksum of a file, whether the file has it inside). ValueError if it has another one inside. A file
        of plain torch.save has none.
        """
        left = max(0, os.path.getsize(path) - cls.size)
        buffer = memoryview(bytearray(1 << 20))
        with open(path, 'rb') as f:
            f.seek(left)
            mark = f.read(len(cls.mark))
            checksum = hashlib.sha256() if mark == cls.old_mark else Checksum()
            f.seek(0)
            while left > 2 and (n := f.readinto(buffer[:left - 2])):
                checksum.update(buffer[:n])
                left -= n
            # the length of the comment: it was zero when the bytes were hashed
            checksum.update(bytes(2))
            length, comment = f.read(left), f.read()
        sealed = mark in (cls.mark, cls.old_mark) and comment == mark + checksum.hexdigest().encode()
        if not sealed:
            # a plain archive ends with a record of 22 bytes, the last two of which say: no comment
            end = (length + comment)[-22:]
            if end[:4] != b'PK\5\6' or end[-2:] != bytes(2):
                raise ValueError('checksum mismatch')
        return checksum.hexdigest(), sealed


def link_or_move(path, other):
    """Make a file available as `other`. Where the file system has hard links, path stays valid too."""
    if os.path.exists(other) and os.path.samefile(path, other):
        return  # of two names of one file, rename() would leave both
    try:
        os.link(path, f'{other}.part')
        os.replace(f'{other}.part', other)
    except OSError:
        os.replace(path, other)


def load(path: str, needed: tuple = SAMPLE_KEYS) -> dict:
    """
    Read a checkpoint onto the CPU, and verify its checksum. FileNotFoundError if there is none, Damaged if
    its bytes are wrong, ValueError if one of the keys `needed` is missing or if memory does not suffice.
    """
    return load_verified(path, needed)[0]


def load_verified(path, needed=SAMPLE_KEYS):
    """(the state, as `load` returns it, and the checksum of the file)"""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} does not exist: train a model into that out_dir first, '
                                'or name another')
    sealed = False
    try:
        digest, sealed = HashedFile.check(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            state = torch.load(path, map_location='cpu', weights_only=True)
        if isinstance(state, dict) and 'shards' in state:
            from nanoblocks.training import shards  # here, as the import takes a second
            shards.attach(state, path)
    except (OSError, Damaged):
        raise
    except Exception as error:  # damaged bytes can raise anything; torch's message would advise trusting them
        raise reason_of(error, path, sealed) from None
    missing = [name for name in needed if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f'{path} lacks {", ".join(missing)}: use a checkpoint that train.py wrote; '
                         'to resume, its ckpt.pt')
    return state, digest


def step_of(path: str) -> int | None:
    """The step of a checkpoint, whose weights are not read; None if there is none that can be read."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)['step']
    except Exception:  # damaged bytes can raise anything
        return None


def shards_of(path: str) -> str | None:
    """The name of the folder with a checkpoint's shards, '' if it has none; None if the disk does not say."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return state['shards']['folder'] if 'shards' in state else ''
    except OSError:
        return None
    except Exception:  # damaged bytes can raise anything, and name nothing
        return ''


def reason_of(error, path, sealed):
    """The exception that says why a file could not be loaded; `sealed`: its bytes have their checksum."""
    if out_of_memory(error):
        size = os.path.getsize(path) / 1e9
        return ValueError(f'{path} needs more memory than is free ({size:.2g} GB, and more for the model): '
                          'end other programs, or use a machine with more memory')
    if sealed:
        return ValueError(f'{path} is complete, but this version of torch cannot read it '
                          f'({type(error).__name__}: {first_line(error)}): use the version that wrote it')
    return Damaged(f'{path} is damaged, or holds more than tensors and plain values '
                   f'({type(error).__name__}): use another checkpoint, or train again')


def out_of_memory(error):
    """Whether an exception means that an allocation failed; torch has no exception for that on the CPU."""
    words = ('allocate memory', 'out of memory', 'bad_alloc', 'bad allocation')
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def contents(model: GPT, **rest) -> dict:
    """
    The dict that `save` writes and `build` reads. Its tensors are the model's own, or its shards. `family`
    is the published one that the weights came from, where they did.
    """
    named = model.state_dict(keep_vars=True)
    # tied weights are saved once
    detached = {id(tensor): tensor.detach() for tensor in named.values()}
    weights = {name: detached[id(tensor)] for name, tensor in named.items()}
    origin = {'family': model.family} if getattr(model, 'family', None) else {}
    return {'model': weights, 'config': asdict(model.config), **origin, **rest}


def averaged(weights: dict, average: dict | None) -> dict:
    """The weights of `contents`, those of them replaced that have an average, by name; tied ones too."""
    found = {id(weights[name]): tensor for name, tensor in (average or {}).items()}
    return {name: found.get(id(tensor), tensor) for name, tensor in weights.items()}


def copied(value, known=None):
    """
    A copy of nested containers and their tensors in the memory of the CPU, which training does not change. A
    tensor that is in two places is copied once, and a shard stays one.
    """
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            known[id(value)] = value.to('cpu', copy=True)
        return known[id(value)]
    if isinstance(value, dict):
        return {name: copied(inner, known) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(inner, known) for inner in value)
    return value


def build(state: dict, path: str, flags=()) -> GPT:
    """
    The model of a loaded checkpoint, some of its flags replaced by `flags`. ValueError if the weights do not
    fit those flags; path is for the message.
    """
    unknown = sorted(state['config'].keys() - {f.name for f in fields(GPTConfig)})
    if unknown:
        raise ValueError(f'{path} has model flags that this version does not know ({", ".join(unknown)}): '
                         'use the version that wrote it')
    trained, flags = with_fixed_norm(state['config']), dict(flags)
    if flags.get('rope_scaling') in ROPE_CONTEXT:
        # scaling starts from the context of training, not from the one asked for now
        flags = {'rope_context': trained['rope_context'] or trained['block_size']} | flags
    try:
        config = GPTConfig(**(trained | flags))
    except ValueError as error:
        if flags:   # which are to blame, and not the file
            raise
        raise ValueError(f'{path} has flags that do not fit each other ({error}): use another '
                         'checkpoint') from None
    model = GPT(config, seed=None)
    ours, theirs = model.state_dict(), state['model']
    misfits = [name for name in ours.keys() | theirs.keys()
               if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape]
    if misfits:
        raise ValueError(f'{path} has weights that do not fit its config ({min(misfits)} differs): '
                         'use another checkpoint')
    model.load_state_dict(theirs)
    model.family = state.get('family')
    return model


def loaded_by(resumed: dict | None, digest: str, weights: GPT | None, meta: dict, settings: dict,
              config: GPTConfig) -> dict:
    """
    {name: value} of all that a process begins with: settings, model flags, data, and the checkpoint that it
    resumes (`digest` of its file) or whose `weights` it begins with.
    """
    found = {'checkpoint': f'{digest[:16]} of step {resumed["step"]}' if resumed else None}
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.state_dict().items()) if weights else ():
        hashed.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    data = hashlib.sha256(repr(meta).encode())
    found |= {'weights': hashed.hexdigest()[:16], 'data': data.hexdigest()[:16]}
    return found | {name: settings[name] for name in settings if name != 'out_dir'} | asdict(config)


def overrides(trained: dict, config: GPTConfig) -> dict:
    """{name: (old, new)} of the flags of `config` that differ from the flags a model was trained with."""
    # an older checkpoint lacks the flags that came after it
    trained = asdict(GPTConfig(**with_fixed_norm(trained)))
    return {name: (trained[name], value) for name, value in asdict(config).items() if value != trained[name]}


# ----------------------------------------------------------------------------------------------------------
# Random generators


def seed_generators(seed):
    """Seed the random generators of torch (on every device), numpy and Python."""
    torch.manual_seed(zlib.crc32(f'{seed}'.encode()))
    np.random.seed(zlib.crc32(f'{seed}'.encode()))
    random.seed(seed)


def generator_states():
    """The states of the same generators, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    states = {'torch': torch.get_rng_state(), 'python': random.getstate(),
              'numpy': (kind, torch.from_numpy(keys.copy()), *rest)}
    if torch.cuda.is_available():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def restore_generators(states):
    kind, keys, *rest = states['numpy']
    np.random.set_state((kind, keys.numpy(), *rest))
    random.setstate(states['python'])
    torch.set_rng_state(states['torch'])
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'])
