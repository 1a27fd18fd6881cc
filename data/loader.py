"""
Batches addressed by number, from the token files that data/writer.py makes.

A row is a window of T + 1 tokens, T = block_size. The seed and the row's number alone decide which window:

    epoch e = row // W                    W windows per epoch, each used once
    window  = permutation_e(row % W)      shuffled by a seeded permutation, which is never stored
    start   = shift_e + window * T        every epoch cuts the text at other places

Of a dataset of pairs (data/pairs/prepare.py), a row is one pair, of T tokens, and the shift is 0.

So there is no generator and no cursor to save: a resumed run continues with the next row number, an
evaluation cannot disturb the order of training, and rows can be dealt to micro-batches and processes in any
way. The files are mapped into memory, and only the rows asked for are read.
"""
import json
import math
import mmap
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .files import lock
from .foreign import read_foreign
from .progress import say
from .writer import DTYPES, sha256_of

HERE = Path(__file__).resolve().parent
# datasets whose prepare.py needs no network: a first run may prepare them itself
OFFLINE = {'pysource'}

# runs a script that ends with its parent process, however the parent ends: a pipe between them is closed then
TIED = '''import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')'''


def open_dataset(folder, block_size, seed, objective=None):
    """The `Dataset` in `folder`, for rows of `block_size` tokens and one of OBJECTIVES (None: next).

    Raises FileNotFoundError if it was never prepared or a file is missing, and ValueError if a file is
    damaged, a split is too short for one row, or it holds pairs and has another objective or block_size.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    train, val = (Tokens(folder, meta['files'][name], DTYPES[meta['dtype']], meta.get('header', 0))
                  for name in ('train', 'val'))
    if 'pairs' in meta:
        check_pairs(meta, folder, block_size, objective)
        return Dataset(meta, train, val, block_size, seed, objective)
    for name, tokens in ('train', train), ('val', val):
        if len(tokens) <= block_size:
            raise ValueError(f'block_size={block_size} must be less than the {len(tokens):,} tokens of '
                             f'the {name} split of {folder}: lower it, or prepare more text')
    return Dataset(meta, train, val, block_size, seed, objective)


def check_pairs(meta, folder, block_size, objective):
    """ValueError unless rows of block_size tokens for this objective are the pairs in `folder`."""
    if not hasattr(objective, 'eot'):
        raise ValueError(f'objective must be prefix, as {folder} holds pairs of a source and a target: add '
                         '--objective=prefix')
    if block_size != row_of_pairs(meta):
        raise ValueError(f'block_size={block_size} must be {row_of_pairs(meta)}, the tokens of a pair in '
                         f'{folder}: add --block_size={row_of_pairs(meta)}')


def row_of_pairs(meta):
    """Tokens of a row of a dataset of pairs."""
    return meta['pairs']['source'] + meta['pairs']['target']


def read_meta(folder):
    """
    What meta.json in `folder` holds, with all that is read from it checked, or would hold of token files of
    another repository. Raises FileNotFoundError where there are neither, and ValueError for contents that
    cannot be.
    """
    path = folder / 'meta.json'
    if not path.exists():
        meta = read_foreign(folder)
        if meta is None:
            raise FileNotFoundError(unprepared(folder))
        return meta
    try:
        meta = json.loads(path.read_bytes())
        meta['vocab_size'], meta['tokenizer'], meta['val_bytes_per_token'], meta['files']
        meta['files']['train'], meta['files']['val'], DTYPES[meta['dtype']]
        for name, ok, rule in meta_rules(meta):
            if not ok:
                value = meta if name == 'meta.json' else meta.get(name)
                raise ValueError(f'{name}={str(value)[:60]} must {rule}')
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
        # any other OSError is no damage: preparing again would replace a dataset that is whole
        kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
        raise ValueError(f'{path} is broken ({kind}{error}): prepare it again, '
                         f'{prepare_command(folder)}') from None
    return meta


def meta_rules(meta):
    """Yields (name, whether its value can be, what it must be)."""
    size, ratio, files = meta['vocab_size'], meta['val_bytes_per_token'], meta['files']
    tokenizer, hashes = meta['tokenizer'], meta.get('sha256', {})
    yield 'vocab_size', type(size) is int and 1 <= size <= 2**32, 'be an int above 0'
    yield ('val_bytes_per_token', type(ratio) in (int, float) and 0 < ratio < math.inf,
           'be a finite number above 0')
    yield 'prompt', isinstance(meta.get('prompt', ''), str), 'be a string'
    counts = [(name, n) for split in ('train', 'val') for name, n in files[split].items()]
    yield ('files', files['train'] and files['val'] and all(type(n) is int and n > 0 for _, n in counts),
           'give each split files, and each file a number of tokens above 0')
    yield ('files', all(name not in ('.', '..') and not re.search(r'[/\\\0]', name) for name, _ in counts),
           'name files of this folder')
    yield ('sha256', isinstance(hashes, dict) and hashes.keys() <= files.keys()
           and all(isinstance(digest, str) for digest in hashes.values()), 'give each split a checksum')
    if 'pairs' in meta:
        pairs = meta['pairs']
        yield ('pairs', all(type(pairs[name]) is int and pairs[name] > 0 for name in ('source', 'target')),
               'give source and target a number of tokens above 0')
        yield 'pairs', type(every := pairs.get('every', 1)) is int and every > 0, 'give an every above 0'
        yield 'pairs', type(pairs['eot']) is int and 0 <= pairs['eot'] < size, 'name an eot of the vocabulary'
        whole = all(sum(files[split].values()) % row_of_pairs(meta) == 0 for split in ('train', 'val'))
        yield 'files', whole, f'hold whole pairs, of {row_of_pairs(meta)} tokens'
    kind = tokenizer['kind']
    texts = {'bytes': (), 'chars': ('chars',), 'tiktoken': ('name',), 'tokenizers': ('json',),
             'bpe': ('split',)}.get(kind if isinstance(kind, str) else '', ())
    yield 'tokenizer', isinstance(kind, str) and all(isinstance(tokenizer[x], str) for x in texts), (
        f'hold {" and ".join(("kind", *texts))} as text')
    if kind == 'bpe':
        yield ('tokenizer', isinstance(tokenizer['tokens'], list)
               and all(isinstance(token, str) for token in tokenizer['tokens']), 'hold a list of tokens')
    if kind in ('bytes', 'chars'):
        fits = size == (257 if kind == 'bytes' else len(tokenizer['chars']))
        yield 'vocab_size', fits, 'be the size of its tokenizer'


def check_hashes(folder, most_bytes=None):
    """
    Compare the token files in `folder` with the checksums and vocab_size in meta.json; raises ValueError on a
    mismatch.

    Reads all of them, about a gigabyte per second. most_bytes: skip the check if they are larger.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    paths = {split: [folder / name for name in files] for split, files in meta['files'].items()}
    size = sum(path.stat().st_size for files in paths.values() for path in files)
    if most_bytes is not None and size > most_bytes:
        return
    for split, digest in meta.get('sha256', {}).items():
        if sha256_of(paths[split]) != digest:
            raise ValueError(f'{" ".join(map(str, paths[split]))} must have the checksum in meta.json, but '
                             f'was damaged: prepare it again, {prepare_command(folder)}')
    for path in (path for files in paths.values() for path in files):
        most = largest_token(path, DTYPES[meta['dtype']], meta.get('header', 0))
        if most >= meta['vocab_size']:
            raise ValueError(f'vocab_size={meta["vocab_size"]} in {folder} must be above all '
                             f'tokens, and {path} holds {most}: prepare it again, {prepare_command(folder)}')


def largest_token(path, dtype, header=0):
    tokens = np.memmap(path, dtype, 'r', header)
    return max(int(tokens[i:i + 2**22].max()) for i in range(0, len(tokens), 2**22))


def ensure_prepared(folder):
    """Prepare the dataset in `folder` if it is missing and needs no network.

    If it is missing and needs one, raises FileNotFoundError with the command to run. Of token files of
    another repository, a line says what they are taken for.
    """
    folder, script = Path(folder), Path(folder) / 'prepare.py'
    if (folder / 'meta.json').exists():
        return
    foreign = read_foreign(folder)
    if foreign:
        say(f'{folder} holds {foreign["source"]}')
        return
    if folder.name not in OFFLINE or not script.exists():
        raise FileNotFoundError(unprepared(folder))
    with open(script) as file:
        # several runs may come here at once: the first one prepares, the others wait and find it done
        if lock_script(file) is False:
            say(f'waiting for another run, which prepares {folder}')
            while lock_script(file) is False:
                time.sleep(0.2)
        if (folder / 'meta.json').exists():
            return
        with subprocess.Popen([sys.executable, '-c', TIED, str(script)], stdin=subprocess.PIPE) as process:
            code = process.wait()
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            raise ValueError(f'{prepare_command(folder)} failed for the reason above: mend it and try again')


def lock_script(file):
    # on Windows a locked file cannot be read, so that nothing keeps two first runs apart there
    return os.name == 'nt' or lock(file)


def prepare_command(folder):
    """The command that prepares `folder`, as a user types it in the root of the repository."""
    again = ['--overwrite=True'] if (folder / 'meta.json').exists() else []
    full = folder.resolve()
    if (folder / 'prepare.py').exists():
        return shlex.join(['python', f'data/{full.name}/prepare.py', *again])
    where = f'--name={full.name}' if full.parent == HERE else f'--out={folder}'
    meta = folder / 'meta.json'
    kind = 'pairs' if meta.is_file() and b'"pairs": ' in meta.read_bytes() else 'text'
    return shlex.join(['python', f'data/{kind}/prepare.py', '--input=YOUR_TEXT', where, *again])


def unprepared(folder):
    if folder.is_file():
        command = ['python', 'data/text/prepare.py', f'--input={folder}', f'--name={folder.stem}']
        return f'the dataset {folder} is a file, not a prepared folder: run {shlex.join(command)}'
    if folder.exists():
        return f'the dataset {folder} has not been prepared: run {prepare_command(folder)}'
    near = get_close_matches(folder.name, [path.parent.name for path in HERE.glob('*/prepare.py')], 1)
    near = [f'./{folder.name}'] if (Path(folder.name) / 'meta.json').exists() else near
    hint = f'; did you mean {near[0]}?' if near else ''
    return f'the dataset {folder} does not exist: run {prepare_command(folder)}{hint}'


class Tokens:
    """A split: its files, memory-mapped, as one sequence of tokens."""

    def __init__(self, folder, files, dtype, header=0):
        """header: the bytes of each file before its tokens"""
        self.parts, self.ends, end = [], [], 0
        for name, n_tokens in files.items():
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f'{path} is missing: prepare it again, {prepare_command(folder)}')
            if path.stat().st_size != header + n_tokens * dtype.itemsize:
                raise ValueError(f'{path} has {path.stat().st_size:,} bytes, not the {n_tokens:,} tokens of '
                                 f'{dtype.itemsize} bytes in meta.json: prepare it again, '
                                 f'{prepare_command(folder)}')
            end += n_tokens
            with open(path, 'rb') as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, 'MADV_RANDOM'):
                # rows lie anywhere in the file: without this, the system would read on behind each of them
                mapped.madvise(mmap.MADV_RANDOM)
            self.parts.append(np.frombuffer(mapped, dtype, offset=header))
            self.ends.append(end)

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def rows(self, starts, length):
        """The tokens [start, start + length) of each start, as int64 of shape (len(starts), length)."""
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts.tolist()):
            filled = 0
            while filled < length:
                i = bisect_right(self.ends, start + filled)
                begin = start + filled - self.ends[i] + len(self.parts[i])
                piece = self.parts[i][begin:begin + length - filled]
                row[filled:filled + len(piece)] = piece
                filled += len(piece)
        return rows


class Dataset:
    """
    Both splits of a prepared folder, as batches: `meta`, `train_batch` and `eval_batches`. `parts` are the
    datasets to evaluate one by one: this one, or those of a mixture (data/mixture.py).
    """

    def __init__(self, meta, train, val, block_size, seed, objective=None):
        self.meta, self.train, self.val = meta, train, val
        self.objective = objective or (lambda rows, keys: inputs_and_targets(rows))
        self.block_size, self.parts = block_size, [self]
        self.key = mix(np.array([seed % 2**64], np.uint64))
        # even the largest shift leaves room for all windows and for the target of the last token
        self.n_shifts = min(block_size, len(train) - block_size)
        self.n_windows = max(1, (len(train) - block_size) // block_size)
        self.after = 1                      # tokens of a row behind its window
        if 'pairs' in meta:
            self.n_shifts, self.n_windows, self.after = 1, len(train) // block_size, 0

    def train_starts(self, numbers):
        """Where the rows of these numbers, uint64 (n,), begin in the training split, int64 (n,)."""
        epoch, index = np.divmod(numbers, np.uint64(self.n_windows))
        key = mix(epoch + self.key)
        window = permute(index, self.n_windows, key)
        return (mix(key) % self.n_shifts + window * self.block_size).astype(np.int64)

    def train_batch(self, first_row, n_rows):
        """
        The tensors of n_rows rows from first_row on, as the objective makes them; x and y, int64 (n_rows,
        block_size), y one token later, where it is the next token.
        """
        return self.objective(*self.train_rows(np.arange(first_row, first_row + n_rows, dtype=np.uint64)))

    def train_rows(self, numbers):
        """The tokens of the rows of these numbers, int64 (n, block_size and more), and a key for each."""
        rows = self.train.rows(self.train_starts(numbers), self.block_size + self.after)
        return rows, mix(numbers + self.key)

    def eval_batches(self, batch_size, max_tokens, rank=0, world=1, full=False):
        """Yields x and y of windows spread evenly over the validation split, without overlap.

        There are as many windows as fit into `max_tokens`, at least one; None: all. They do not depend on
        batch_size and world: process `rank` takes every world-th of them, which may be none.
        full=True adds rows with targets of -1, so that all batches have the same size and every process has
        the same number of batches.
        """
        available = (len(self.val) - self.after) // self.block_size
        wanted = available if max_tokens is None else max(1, min(available, max_tokens // self.block_size))
        starts = np.arange(wanted, dtype=np.int64) * available // wanted * self.block_size
        starts, most = starts[rank::world], -(-wanted // world)
        for i in range(0, most if full else len(starts), batch_size):
            own = starts[i:i + batch_size]
            rows = self.val.rows(own, self.block_size + self.after)
            x, y, *others = self.objective(rows, mix(own.astype(np.uint64)))
            if full and len(x) < batch_size:
                more = (0, 0, 0, batch_size - len(x))
                x, y, *others = F.pad(x, more), F.pad(y, more, value=-1), *(F.pad(z, more) for z in others)
            yield x, y, *others

    def judged(self, losses):
        """(loss, bits per byte, {name: both} of several datasets) of the validation losses of `parts`."""
        return losses[0], losses[0] / math.log(2) / self.meta['val_bytes_per_token'], {}


def prefetched(batches, depth, pin=False):
    """
    The items of an iterator, prefetched by a thread: up to `depth` of them wait in a queue. With depth=0 each
    is made when it is asked for, without a thread. pin: into pinned memory, so that copies to a GPU overlap
    with its work.
    """
    if not depth:
        yield from batches
        return
    made, closed = queue.Queue(depth), threading.Event()

    def put(item):
        while not closed.is_set():
            try:
                return made.put(item, timeout=1)
            except queue.Full:
                pass  # look whether the consumer is gone

    def work():
        try:
            for batch in batches:
                put((tuple(x.pin_memory() for x in batch) if pin else batch, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            batch, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield batch
    finally:
        closed.set()


def inputs_and_targets(rows):
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def mix(x):
    """A pseudo-random bijection of 64-bit integers (SplitMix64, Steele et al. 2014); x is a uint64 array."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def hash32(x):
    """32 pseudo-random bits of a uint64 array: cheaper than `mix`, for use in several rounds."""
    x = x * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 32)) * 0xBF58476D1CE4E5B9
    return x >> 32


def permute(index, n, key):
    """The images of indices below n under permutations of range(n), selected by their keys; uint64 arrays.

    A Feistel network shuffles the cells of an a x b grid: each half round adds a hash of one coordinate to
    the other, which can be undone, so it is a bijection of the a * b >= n cells. A cell that is not below n
    goes through the network again until it is (cycle walking), which makes a bijection of range(n).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    index, todo = index.copy(), np.arange(len(index))
    while len(todo):
        row, column = np.divmod(index[todo], b)
        round_key = key[todo]
        for _ in range(3):
            row = (row + hash32(column ^ round_key)) % a
            column = (column + hash32(row ^ ~round_key)) % b
            round_key = round_key + 0x94D049BB133111EB
        index[todo] = row * b + column
        todo = todo[index[todo] >= n]
    return index
