"""
Documents to token files: one or more .bin files for each split, and the meta.json that describes them.

    train.bin, val.bin       token ids, uint16 (uint32 for large vocabularies), one document after another
    train_000.bin, ...       the same in several files, for large corpora
    meta.json                tokenizer, counts, files and checksums

meta.json is written last, and a folder is a dataset when it holds one. Until then the files end in .tmp: an
interrupted preparation is never mistaken for a complete one, and an older dataset in the same folder stays
usable until the new one is complete.
"""
import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .encoding import END, MORE, encoded_parts
from .files import Lock, flush_file, write_json
from .progress import say

# little-endian on every machine, so that token files can be copied between machines
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}

# tokens between two saves of the progress: some seconds of work
SAVE_EVERY = 20_000_000


def write_dataset(folder, documents, tokenizer, source, append_eot=True, shard_tokens=None,
                  save_every=SAVE_EVERY, prompt='', processes=1):
    """Write `documents`, an iterable of ('train' or 'val', text), to `folder`; returns what meta.json holds.

    A document may come in parts: (split, text, MORE), ..., (split, text, END). CUT in place of END says that
    the text does not end there, so that no end token follows.

    source        where the text comes from and how it was split, in words
    append_eot    end every document with tokenizer.eot, if the tokenizer has one
    prompt        what sample.py continues when it is given no prompt; empty: a new document
    shard_tokens  begin a new file after a document with which a file has this many tokens; None: one file
    processes     that encode, above 1 beside this one, which reads and writes

    Holds one part in memory, and the tokens of a piece of it; of each process, a few batches of parts. If
    `documents` has state_dict() and load_state_dict(), as the streams of `datasets` have, the progress is
    saved every `save_every` tokens, and the same call after an interruption resumes from there, with any
    number of processes; the files are then the same, byte for byte. Raises ValueError for an empty split.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32'
    settings = {'source': source, 'prompt': prompt, 'tokenizer': tokenizer.meta(),
                'vocab_size': tokenizer.vocab_size,
                'dtype': dtype, 'append_eot': append_eot, 'shard_tokens': shard_tokens,
                'input': getattr(documents, 'origin', None)}
    resumable = hasattr(documents, 'state_dict')
    saved = load_progress(folder, settings) if resumable else None
    if saved:
        documents.load_state_dict(saved['documents'])
    splits = {name: SplitWriter(folder, name, DTYPES[dtype], shard_tokens, saved and saved['splits'][name])
              for name in ('train', 'val')}
    unsaved, eot = 0, [tokenizer.eot] if append_eot and tokenizer.eot is not None else []
    within = {name: split.within for name, split in splits.items()}
    for split, pieces, end, state in encoded_parts(documents, tokenizer, within, processes):
        unsaved += splits[split].add_part(pieces, end, eot)
        if resumable and unsaved >= save_every and state:
            states = {name: split.save() for name, split in splits.items()}
            write_json(folder / 'progress.json',
                       {'settings': settings, 'splits': states, 'documents': state()})
            unsaved = 0
    return publish(folder, settings, splits)


def write_pairs(folder, pairs, tokenizer, source, sizes, every=1):
    """Write `pairs`, an iterable of ('train' or 'val', tokens, tokens, bytes of both), to `folder`.

    A pair is a row of sizes = (S, L) tokens: the first tokens, filled up to S with tokenizer.eot, the second,
    which the same token ends, filled up to L. Neither may be longer. every: objectives.Pairs. What sample.py
    is given by default is the first source of the validation split. Returns what meta.json holds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32'
    settings = {'source': source, 'prompt': '', 'tokenizer': tokenizer.meta(), 'dtype': dtype,
                'vocab_size': tokenizer.vocab_size,
                'pairs': {'source': sizes[0], 'target': sizes[1], 'eot': tokenizer.eot}
                | ({'every': every} if every > 1 else {})}
    splits = {name: SplitWriter(folder, name, DTYPES[dtype], None) for name in ('train', 'val')}
    for split, first, second, n_bytes in pairs:
        fill = [size - len(tokens) for size, tokens in zip(sizes, (first, second))]
        eot, state = [tokenizer.eot], splits[split].state
        if split == 'val' and not state['documents']:
            settings['prompt'] = tokenizer.decode(first)
        splits[split].add([*first, *fill[0] * eot, *second, *fill[1] * eot], n_bytes)
        state['documents'] += 1
        state['fill'] = state.get('fill', 0) + sum(fill)
    return publish(folder, settings, splits)


class SplitWriter:
    """The files of one split, under temporary names. `state` is what meta.json and a resume need."""

    def __init__(self, folder, name, dtype, shard_tokens, state=None):
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.state = state or {'documents': 0, 'bytes': 0, 'tokens': 0, 'files': {}}
        self.file, self.within = None, self.state.pop('within', False)
        if self.state['files']:
            # tokens written after the last save of the progress are cut off and written again
            last, n_tokens = list(self.state['files'].items())[-1]
            self.file = open(temporary(folder / last), 'r+b')
            self.file.truncate(n_tokens * dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def add_part(self, pieces, end, eot):
        """
        Append a part of a document, of which `pieces` are (ids, number of bytes); returns the number of
        tokens. A document without text is left out.
        """
        before = self.state['tokens']
        for ids, n_bytes in pieces:
            self.add(ids, n_bytes)
        if self.within and end != MORE:
            if end == END:
                self.add(eot, 0)
            self.within = False
            self.state['documents'] += 1
        return self.state['tokens'] - before

    def add(self, ids, n_bytes):
        """Append token ids, and the number of bytes of their text."""
        files = self.state['files']
        last = list(files)[-1] if files else None
        full = self.shard_tokens and last and files[last] >= self.shard_tokens
        if last is None or full and not self.within:
            self.close()
            last = f'{self.name}_{len(files):03d}.bin' if self.shard_tokens else f'{self.name}.bin'
            self.file, files[last] = open(temporary(self.folder / last), 'wb'), 0
        self.within = True
        self.file.write(np.array(ids, self.dtype).tobytes())
        files[last] += len(ids)
        self.state['tokens'] += len(ids)
        self.state['bytes'] += n_bytes

    def save(self):
        """Bring everything to the disk. Returns the state that a resume needs."""
        if self.file:
            flush_file(self.file)
        return self.state | {'within': self.within}

    def close(self):
        if self.file:
            self.save()
            self.file.close()
            self.file = None

    def sha256(self):
        """The checksum of the tokens of the split, which does not depend on the files they are in."""
        return sha256_of([temporary(self.folder / name) for name in self.state['files']])


def publish(folder, settings, splits):
    """Rename the finished files and write meta.json."""
    for name, split in splits.items():
        split.close()
        if not split.state['tokens']:
            raise ValueError(f'the {name} split of {folder} is empty: give more text, or change its share')
    train, val = splits['train'].state, splits['val'].state
    meta = {key: settings[key] for key in ('source', 'prompt', 'tokenizer', 'vocab_size', 'dtype')}
    if 'pairs' in settings:
        meta['pairs'] = settings['pairs']
    for key in ('tokens', 'bytes', 'documents'):
        meta |= {f'train_{key}': train[key], f'val_{key}': val[key]}
    meta['val_bytes_per_token'] = val['bytes'] / (val['tokens'] - val.get('fill', 0))
    meta['files'] = {name: split.state['files'] for name, split in splits.items()}
    meta['sha256'] = {name: split.sha256() for name, split in splits.items()}

    # while it is there, the renamed files are no dataset (data/foreign.py)
    write_json(temporary(folder / 'meta.json'), meta)
    (folder / 'meta.json').unlink(missing_ok=True)
    names = [*train['files'], *val['files']]
    for name in names:
        os.replace(temporary(folder / name), folder / name)
    for path in list(folder.iterdir()):
        # left by an earlier preparation that was interrupted or wrote other files
        if re.fullmatch(r'(train|val)(_\d+)?\.bin(\.tmp)?', path.name) and path.name not in names:
            path.unlink()
    os.replace(temporary(folder / 'meta.json'), folder / 'meta.json')
    (folder / 'progress.json').unlink(missing_ok=True)
    return meta


def load_progress(folder, settings):
    """
    The progress that an interrupted call with the same settings saved; None if there is none, or, with a line
    that says why, if it cannot be resumed. OSError where it cannot be read.
    """
    path = folder / 'progress.json'
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_bytes())
        reason = why_not_resumed(folder, settings, saved)
        done, _ = sum(split['tokens'] for split in saved['splits'].values()), saved['documents']
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = 'progress.json is damaged'
    if reason:
        say(f'an interrupted preparation in {folder} cannot be resumed ({reason}): beginning anew')
        return None
    say(f'resuming in {folder} after {done:,} tokens')
    return saved


def why_not_resumed(folder, settings, saved):
    """What keeps the progress `saved` from being continued with these settings; None if nothing does."""
    differ = [name for name, value in settings.items() if saved['settings'].get(name) != value]
    if differ:
        return f'another {" and ".join(differ)}'
    for split in saved['splits'].values():
        for name, n_tokens in split['files'].items():
            path = temporary(folder / name)
            if not path.exists() or path.stat().st_size < n_tokens * DTYPES[settings['dtype']].itemsize:
                return f'{path.name} is missing or too short'


def sha256_of(paths):
    """The checksum of the bytes of several files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def locked(folder):
    """
    Within it, no other process prepares a dataset in `folder`; ValueError if one does. The lock is dropped by
    the system when its process ends, however it ends.
    """
    try:
        lock = Lock(folder / 'prepare.lock')
    except BlockingIOError:
        raise ValueError(f'out={folder} must be used by one preparation at a time, and another one runs: '
                         'wait until it is done, or write to another folder with --out=FOLDER') from None
    if not lock.works:
        say(f'warning: the file system of {folder} has no locks: start no second preparation there')
    try:
        yield
    finally:
        lock.release()


def temporary(path):
    return path.with_name(path.name + '.tmp')
