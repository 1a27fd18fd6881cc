"""What the prepare.py scripts share: the frame around a preparation, tokenizers, splits, downloading."""
import hashlib
import json
import os
import re
import shlex
import urllib.request
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from .foreign import read_foreign
from .progress import say
from .tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    from_checkpoint,
    from_folder,
    from_meta,
    need,
    read_text,
)
from .writer import locked, temporary

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def preparation(folder, overwrite, resumes=False):
    """
    The frame of a preparation: one at a time in a folder, no dataset replaced unasked, a sentence where it is
    interrupted. resumes: the same command continues an interrupted one.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'out={folder} must be a folder that can be made ({error.strerror}): choose another '
                      'with --out=FOLDER') from None
    try:
        with locked(folder):
            if (folder / 'meta.json').exists() and not overwrite:
                raise ValueError(f'overwrite={overwrite} must be True to replace the dataset in {folder}: '
                                 'add --overwrite=True, or write to another folder with --out=FOLDER')
            yield folder
    except OSError as error:
        if error.filename is None and error.errno is not None:  # such as a full disk
            raise OSError(f'{folder} cannot be written ({error.strerror}): make room or choose --out=FOLDER, '
                          'and run the same command again') from None
        raise
    except KeyboardInterrupt:
        then = 'the same command resumes' if resumes else 'the same command begins anew'
        say(f'\ninterrupted before the dataset in {folder} was complete; {then}')
        raise SystemExit(130) from None


def make_tokenizer(name, texts, vocab_size):
    """
    The tokenizer called `name`: bytes; chars or bpe, made from the texts; a vocabulary of tiktoken; or the
    tokenizer of a checkpoint in Hugging Face format, a run or another dataset, each given by its folder, or
    of a repository of the Hugging Face hub, given as owner/name.
    """
    if os.path.isdir(name) or name.endswith('.pt') and os.path.isfile(name):
        tokenizer = from_folder(name) if os.path.isdir(name) else from_checkpoint(name)
        foreign = read_foreign(Path(name)) if tokenizer is None else None
        if foreign:
            return from_meta(foreign['tokenizer'])
        if tokenizer is None:
            raise ValueError(f'tokenizer={name} must hold tokenizer.json, the ckpt.pt of a run or the '
                             'meta.json of a dataset: name another folder, or gpt2 for the tokens of GPT-2')
        return tokenizer
    if name.count('/') == 1 and name[0] not in './~' and not os.path.exists(name):
        return make_tokenizer(hub_folder(name), texts, vocab_size)
    if name == 'bytes':
        return ByteTokenizer()
    if name == 'chars':
        return CharTokenizer(characters(texts))
    if name == 'bpe':
        return BPETokenizer.train(texts, vocab_size)
    return TiktokenTokenizer(name)


def hub_folder(name):
    """The folder to which the tokenizer of a repository of the Hugging Face hub is downloaded."""
    hub = need('huggingface_hub', f'tokenizer={name}, which is no folder here,')
    try:
        return hub.snapshot_download(name, allow_patterns=['*.json', '*.model', '*.txt', '*.bpe'],
                                     ignore_patterns=['*.index.json'])
    except Exception as error:  # no network, no such repository, no permission: many classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f'tokenizer={name} is not a folder here, and downloading it from the hub failed '
                      f'({reason}): name a folder, or go online once') from None


def characters(texts):
    """The set of characters of all texts, of which one at a time is in memory."""
    found = set()
    for text in texts:
        found.update(text)
    return found


def check_val_fraction(val_fraction, default, given=''):
    """given: what holds the validation text, so that no share decides"""
    if given and val_fraction != default:
        raise ValueError(f'val_fraction={val_fraction} must be left out beside {given}, which is the '
                         'validation text')
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} must be above 0 and below 1')


def check_own(input, name, own_name, val_fraction, val_input=''):
    """ValueError for settings of a script that reads a user's own files. own_name: its default for `name`."""
    if not input:
        raise ValueError('input must be set to a file or a folder: --input=PATH')
    for setting, path in ('input', input), ('val_input', val_input):
        if '://' in path:
            raise ValueError(f'{setting}={path} must be a file or a folder of this machine: '
                             'download it first')
    check_val_fraction(val_fraction, 0.1, val_input)
    train, val = (Path(path).expanduser().resolve() for path in (input, val_input))
    if val_input and (train == val or train in val.parents or val in train.parents):
        raise ValueError(f'val_input={val_input} must lie outside of input={input}, and not hold it, as no '
                         'text may be trained on and validated on: move it')
    taken = name != own_name and (ROOT / 'data' / name / 'prepare.py').exists()
    if taken or not re.fullmatch(r'\w[\w.-]*', name):
        raise ValueError(f'name={name} must be a plain name that no other dataset has')


def halves_in_words(input, val_input, val_fraction):
    """Where the text comes from and how it was split, as meta.json says it."""
    name, val = (Path(path).expanduser().resolve().name for path in (input, val_input))
    return f'{name}, {f"and {val}" if val_input else val_fraction} for validation'


class Again:
    """
    Parts of documents as write_dataset takes them, made by make(). To resume, those that are written already
    are read once more and passed over. origin: what must be the same for that, of plain JSON types.
    """

    def __init__(self, make, origin):
        self.make, self.origin, self.done = make, origin, 0

    def __iter__(self):
        for part in islice(self.make(), self.done, None):
            # counted before the yield: the writer asks for the state after it has written this part
            self.done += 1
            yield part

    def state_dict(self):
        return {'parts': self.done}

    def load_state_dict(self, state):
        self.done = state['parts']


def origin_of(corpora, *settings):
    """A text that differs where a file of the corpora, or a setting, has changed."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
             for corpus in corpora for path in corpus.paths]
    return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()


def learned_before(folder, origin):
    """The tokenizer of an interrupted preparation of the same texts; None where there is none."""
    try:
        settings = json.loads((Path(folder) / 'progress.json').read_bytes())['settings']
        return from_meta(settings['tokenizer']) if settings['input'] == origin else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_processes(processes):
    if processes < 1:
        raise ValueError(f'processes={processes} must be at least 1')


def split_of(key, val_fraction):
    """
    'val' for about this fraction of all keys, else 'train'. It depends on a hash of the key alone, so a
    document stays in its split when others are added.
    """
    hashed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big')
    return 'val' if hashed < val_fraction * 2**64 else 'train'


def fetch(url, path):
    """The text at `url`, downloaded to the file `path` unless that exists; OSError without a network."""
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise OSError(f'{url} cannot be downloaded ({error}): get it some other way, and pass '
                          '--input=FILE') from None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary(path).write_bytes(content)
        temporary(path).replace(path)
    return read_text(path)


def print_summary(folder, meta, train='train.py'):
    """The sizes of a dataset that has just been written, and the command that trains on it."""
    for split in ('train', 'val'):
        say(f'{split:5}  {meta[split + "_documents"]:>11,} documents  {meta[split + "_bytes"]:>15,} bytes  '
            f'{meta[split + "_tokens"]:>14,} tokens')
    say(f'{meta["tokenizer"]["kind"]} vocabulary of {meta["vocab_size"]:,}, '
        f'{meta["val_bytes_per_token"]:.3f} bytes per token, in {folder}')
    script, *flags = train.split()
    command = ['python', os.path.relpath(ROOT / script), *flags, f'--dataset={dataset_name(folder)}']
    say(f'next: {shlex.join(command)}')


def dataset_name(folder):
    """A folder as train.py's --dataset takes it: a name in data/, or a path."""
    path = Path(folder).resolve()
    if path.parent == ROOT / 'data':
        return path.name
    return str(folder) if os.path.dirname(folder) else os.path.join('.', folder)
