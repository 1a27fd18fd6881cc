"""
Text to token ids and back: bytes, characters, tiktoken's vocabularies, a small BPE trained on the spot.

Every tokenizer has

    vocab_size            one more than the largest id
    eot                   the id that ends a document, or None
    ends                  all ids that end a text: eot, and those that a published checkpoint has beside it
    bos                   the id that a text begins with: eot, unless a published checkpoint has another
    encode(text)          -> list of ids
    decode(ids)           -> text; bytes that are not UTF-8 become U+FFFD
    prompt(text)          -> list of ids to continue; as encode, but for published checkpoints
    decode_bytes(ids, before=())    -> bytes, for printing token by token: a character may span several
                             tokens. before: the tokens in front, on which a blank may depend
    meta()                -> a dictionary of plain JSON types, from which `from_meta` builds it again

meta() is stored beside the tokens and in every checkpoint, so a model always comes with its tokenizer.

To `encode`, text is ordinary text: "<|endoftext|>" in it is encoded letter by letter, never as the special
token. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
"""
import importlib
import json
import os
import re
from collections import Counter, defaultdict
from itertools import chain

from .bpe import learned
from .progress import Progress

EOT_BYTES = b'<|endoftext|>'

# Words, numbers of up to three digits, runs of punctuation, and white space, the last blank of which goes
# with the next word. Every character matches one of these, so the pieces joined are the text.
SPLIT = r' ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s'

# characters without white space, or of white space, that tiktoken gets at once
LONGEST_RUN = 25_000
LONG_RUN = re.compile(rf'(?<!\S)\S{{{LONGEST_RUN + 1},}}|(?<!\s)\s{{{LONGEST_RUN + 1},}}')

# the white space of SPLIT; a unit is a run of it with the run of other characters behind it, and is divided
# alike wherever it stands
BLANKS = ('\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000'
          + ''.join(map(chr, range(0x2000, 0x200B))))
# found at the run's beginning alone: looked for at each blank, a long run would take its length squared
UNIT = re.compile(f'(?<![{BLANKS}])[{BLANKS}]+[^{BLANKS}]+')

# distinct words, and distinct units, that train_bpe counts at a time
MOST_WORDS, MOST_UNITS = 2_000_000, 1_000_000


def utf8(text):
    """The UTF-8 bytes of `text`, with U+FFFD for lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()


def need(module, what):
    """import_module, for packages that only some uses need. Raises ValueError where one is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition('.')[0]
        raise ValueError(f'{what} needs {package}: pip install {package}') from None


class Vocabulary:
    """What the tokenizers share: the same token begins and ends a document."""

    eot = None
    special = frozenset()   # ids that stand for no text: marks of documents, of a chat

    @property
    def ends(self):
        return () if self.eot is None else (self.eot,)

    @property
    def bos(self):
        return self.eot


class ByteTokenizer(Vocabulary):
    """UTF-8 bytes: ids 0 to 255, and 256 for the end of a document. It can encode every text."""

    vocab_size = 257
    eot = 256

    def encode(self, text):
        return list(utf8(text))

    prompt = encode

    def decode_bytes(self, ids, before=()):
        return b''.join(EOT_BYTES if i == self.eot else bytes([i]) for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors='replace')

    def meta(self):
        return {'kind': 'bytes'}


class CharTokenizer(Vocabulary):
    """One id per character of a given text, in sorted order, as in nanoGPT. No token ends a document."""

    def __init__(self, text):
        self.chars = ''.join(sorted(set(text)))
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text):
        try:
            return [self.ids[char] for char in text]
        except KeyError:
            unknown = ''.join(sorted(set(text) - set(self.chars)))[:20]
            raise ValueError(f'the vocabulary of {self.vocab_size} characters has no {unknown!r}: leave them '
                             'out, or prepare the dataset with tokenizer=bytes, which has all') from None

    prompt = encode

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def decode_bytes(self, ids, before=()):
        return utf8(self.decode(ids))

    def meta(self):
        return {'kind': 'chars', 'chars': self.chars}


class TiktokenTokenizer(Vocabulary):
    """A published vocabulary: 'gpt2', 'cl100k_base', ... which tiktoken downloads once and keeps.

    Raises ValueError for a name that tiktoken does not know, and OSError if the download fails.
    """

    def __init__(self, name):
        tiktoken = need('tiktoken', f'tokenizer={name}')
        if name not in tiktoken.list_encoding_names():
            known = ', '.join(['bytes', 'chars', 'bpe'] + sorted(tiktoken.list_encoding_names()))
            raise ValueError(f'tokenizer={name!r} is unknown: choose one of {known}')
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:
            raise OSError(f'the vocabulary of {name!r} cannot be fetched ({type(error).__name__}): go online '
                          'once, or set TIKTOKEN_CACHE_DIR to a folder that holds it') from None
        self.name, self.vocab_size, self.eot = name, self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text):
        parts = [self.encoding.encode_ordinary(part) for part in without_long_runs(text)]
        return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))

    prompt = encode

    def decode_bytes(self, ids, before=()):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors='replace')

    def meta(self):
        return {'kind': 'tiktoken', 'name': self.name}


class BPETokenizer(TiktokenTokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, trained by `train_bpe` and run by tiktoken.

    `tokens` are the merged tokens in the order in which they were learned, each a string with one character
    (U+0000 to U+00FF) per byte. Ids 0 to 255 are the bytes themselves, and the last id ends a document.
    """

    def __init__(self, tokens, split=SPLIT):
        tiktoken = need('tiktoken', 'tokenizer=bpe')
        self.tokens, self.split = list(tokens), split
        ranks = {bytes([i]): i for i in range(256)}
        ranks.update({token.encode('latin-1'): 256 + i for i, token in enumerate(self.tokens)})
        self.vocab_size, self.eot = len(ranks) + 1, len(ranks)
        try:
            self.encoding = tiktoken.Encoding('bpe', pat_str=split, mergeable_ranks=ranks,
                                              special_tokens={EOT_BYTES.decode(): self.eot})
        except ValueError as error:
            raise ValueError(f'split={split!r} of a bpe tokenizer must be a regular expression '
                             f'({str(error).splitlines()[0]}): prepare the dataset again') from None

    @classmethod
    def train(cls, texts, vocab_size):
        """A tokenizer of `vocab_size` ids, at least 257; fewer where no pair of tokens occurs twice."""
        if vocab_size < 257:
            raise ValueError(f'vocab_size={vocab_size} must be at least 257: bytes and the end of a document')
        return cls(train_bpe(texts, vocab_size - 257))

    def meta(self):
        return {'kind': 'bpe', 'tokens': self.tokens, 'split': self.split}


def without_long_runs(text):
    """The text in parts, without runs that are too long for tiktoken's patterns, such as a million blanks."""
    # a longer run would fill one of these blocks, which most often a look at its first characters refutes
    half = LONGEST_RUN // 2
    blocks = (text[at:at + half] for at in range(0, len(text) - half + 1, half))
    if not any(block.isspace() or block.split(None, 1) == [block] for block in blocks):
        return [text]
    cuts = [at for run in LONG_RUN.finditer(text)
            for at in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, None])]


def count_words(texts):
    """
    How often each word of the texts occurs. Of more than MOST_WORDS words the rarest are forgotten, so that
    the memory does not grow with the text.
    """
    # installed with tiktoken, and reads the same patterns
    split = need('regex', 'tokenizer=bpe').compile(SPLIT).findall
    words, units, least = Counter(), Counter(), 1
    for text in texts:
        for part in without_long_runs(text):
            # most units occur many times, and SPLIT is slow: so count them first
            units.update(UNIT.findall(part))
            begin, end = UNIT.search(part), len(part.rstrip(BLANKS))
            words.update(split(part[:begin.start()] if begin else part))
            words.update(split(part[end:]) if begin else ())
        if len(units) > MOST_UNITS:
            add_words(words, units, split)
        while len(words) > MOST_WORDS:
            least += 1
            words = Counter({word: n for word, n in words.items() if n >= least})
    add_words(words, units, split)
    return words


def add_words(words, units, split):
    """Move the words in `units` to `words`, both Counters."""
    alike = defaultdict(list)
    for unit, n in units.items():
        alike[n].append(unit)
    for n, group in alike.items():
        for word, times in Counter(split(''.join(group))).items():
            words[word] += n * times
    units.clear()


def train_bpe(texts, n_merges):
    """The first `n_merges` tokens that byte-pair encoding learns from `texts`, in order; see data/bpe.py."""
    words = count_words(texts)
    progress = Progress('training the vocabulary', n_merges)
    tokens = []
    for token in learned([utf8(word) for word in words], list(words.values()), n_merges):
        tokens.append(token.decode('latin-1'))
        progress.add()
    progress.close()
    return tokens


def mask_of(meta):
    """The id of [MASK] or <mask> in the vocabulary of a checkpoint, from a tokenizer's `meta`; else None."""
    added = json.loads(meta['json']).get('added_tokens') if meta['kind'] == 'tokenizers' else None
    ids = {token['content']: token['id'] for token in added or ()}
    return ids.get('[MASK]', ids.get('<mask>'))


class HFTokenizer(Vocabulary):
    """The vocabulary of a published checkpoint: its tokenizer.json, run by the tokenizers library.

    `encode` takes special tokens in a text for ordinary text. `prompt` is what the library makes of a prompt:
    it knows the special tokens of a chat, and adds the tokens that the checkpoint expects before a text, such
    as Llama's <|begin_of_text|>. Truncation and padding, which some files ask for, are for batches of
    training, and are turned off.
    `decode` is the library's, which may drop a blank that the vocabulary puts before a text; `decode_bytes`
    keeps it.
    """

    def __init__(self, json_text, eot=None, ends=None, bos=None, add_bos=False):
        """add_bos: whether `prompt` begins with bos, even if tokenizer.json does not say so"""
        tokenizers = need('tokenizers', 'the tokenizer of a checkpoint')
        self.json, self.eot, self.add_bos = json_text, eot, add_bos
        self._ends, self._bos = ends, bos
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f'tokenizer.json is not understood ({error}): fetch it again') from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.special = frozenset(i for i, token in self.tokenizer.get_added_tokens_decoder().items()
                                 if token.special)
        # ids may have gaps
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        # a token spells its bytes in GPT-2's alphabet, or as text in which <0x0A> stands for a byte; decoders
        # of other kinds put blanks between tokens, or take them away
        decoder = json.loads(json_text).get('decoder') or {}
        steps = [step for step in (decoder, *decoder.get('decoders', ())) if step.get('type') != 'Sequence']
        kinds = {step['type'] for step in steps if 'type' in step}
        self.bytes_of = byte_alphabet() if 'ByteLevel' in kinds else None
        self.blank = '\u2581' if kinds & {'Metaspace', 'Replace'} else ' '
        self.byte_fallback = 'ByteFallback' in kinds
        self.joins = not kinds or not all(map(is_spelling, steps))

    @property
    def ends(self):
        return super().ends if self._ends is None else tuple(self._ends)

    @property
    def bos(self):
        return self.eot if self._bos is None else self._bos

    def encode(self, text):
        return self.run(text, False)

    def run(self, text, special):
        """The library's ids. special: whether it knows special tokens in a text, and adds those in front."""
        self.tokenizer.encode_special_tokens = not special
        try:
            return self.tokenizer.encode(utf8(text).decode(), add_special_tokens=special).ids
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f'the vocabulary of the checkpoint cannot spell {text[:20]!r} '
                             f'({error}): leave out characters that it lacks') from None

    def prompt(self, text):
        ids = self.run(text, True)
        return [self.bos, *ids] if self.add_bos and ids[:1] != [self.bos] else ids

    def decode_bytes(self, ids, before=()):
        if not self.joins:
            return b''.join(map(self.token_bytes, ids))
        before = [*before][-8:]  # a blank depends on the neighbours alone
        head, text = self.decode(before), self.decode([*before, *ids])
        return utf8(text.removeprefix(head) if text.startswith(head) else self.decode(ids))

    def token_bytes(self, i):
        token = self.tokenizer.id_to_token(i) or ''
        if self.bytes_of:
            # as the library does, a special token too is read as bytes if the alphabet has all its characters
            spelt = [self.bytes_of.get(char) for char in token]
            return utf8(token) if None in spelt else bytes(spelt)
        if self.byte_fallback and re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes([int(token[3:5], 16)])
        return utf8(token.replace(self.blank, ' '))

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def meta(self):
        return {'kind': 'tokenizers', 'json': self.json, 'eot': self.eot, 'ends': list(self.ends),
                'bos': self._bos, 'add_bos': self.add_bos}


def is_spelling(step):
    """Whether a step of a decoder only says how bytes and blanks are spelt in a token."""
    if step.get('type') == 'Replace':
        return step.get('pattern') == {'String': '\u2581'} and step.get('content') == ' '
    return step.get('type') in ('ByteLevel', 'Metaspace', 'ByteFallback', 'Fuse', 'Strip')


def byte_alphabet():
    """{character: byte} of GPT-2's vocabulary: a printable byte is itself, the others are U+0100 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def from_meta(meta):
    """The tokenizer that `tokenizer.meta()` described. ValueError where it describes none."""
    kind = meta.get('kind') if isinstance(meta, dict) else None
    if not is_text(kind) or kind not in META:
        raise ValueError(f'tokenizer kind {kind!r} is unknown: it must be bytes, chars, tiktoken, bpe or '
                         'tokenizers')
    for key, holds in META[kind].items():
        if not holds(meta.get(key)):
            raise ValueError(f'{key} of a {kind} tokenizer must not be {str(meta.get(key))[:40]!r}: prepare '
                             'the dataset again')
    if kind == 'bytes':
        return ByteTokenizer()
    if kind == 'chars':
        return CharTokenizer(meta['chars'])
    if kind == 'tiktoken':
        return TiktokenTokenizer(meta['name'])
    if kind == 'bpe':
        return BPETokenizer(meta['tokens'], meta['split'])
    return HFTokenizer(meta['json'], *map(meta.get, ('eot', 'ends', 'bos')), bool(meta.get('add_bos')))


def is_id(value):
    return type(value) is int and value >= 0


def are_tokens(value):
    """Whether these can be the tokens of BPETokenizer: one character per byte, and each token once."""
    return (isinstance(value, list) and all(is_text(x) and len(x) > 1 and max(x) <= '\xFF' for x in value)
            and len(set(value)) == len(value))


def is_text(value):
    return isinstance(value, str)


def is_id_or_none(value):
    return value is None or is_id(value)


# {kind: {key of meta(): what its value must be}}
META = {
    'bytes': {},
    'chars': {'chars': lambda value: is_text(value) and value != '' and sorted(set(value)) == list(value)},
    'tiktoken': {'name': is_text},
    'bpe': {'tokens': are_tokens, 'split': is_text},
    'tokenizers': {'json': is_text, 'eot': is_id_or_none, 'bos': is_id_or_none,
                   'ends': lambda value: value is None or isinstance(value, list) and all(map(is_id, value))}}


# ----------------------------------------------------------------------------------------------------------
# The tokenizer that a folder holds

# files of the layouts that precede tokenizer.json, which transformers knows how to read
OTHER_LAYOUTS = ('vocab.json', 'vocab.txt', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model',
                 'vocab.bpe', 'tekken.json')


def from_folder(folder):
    """The tokenizer of a checkpoint in Hugging Face format, a run or a dataset; None where there is none.

    Raises ValueError for one that is damaged, or that needs a package which is not installed.
    """
    text = json_of_folder(folder)
    if text is not None:
        return HFTokenizer(text, **ends_of(folder, HFTokenizer(text)))
    meta = read_json(os.path.join(folder, 'meta.json')) if os.path.isdir(folder) else {}
    if 'tokenizer' in meta:
        return from_meta(meta['tokenizer'])
    for name in ('ckpt.pt', 'best.pt', 'ckpt.prev.pt'):
        if os.path.isfile(os.path.join(folder, name)):
            return from_checkpoint(os.path.join(folder, name))


def from_checkpoint(path):
    """The tokenizer in a checkpoint of a run; None where it holds none, as nanoGPT's."""
    import torch
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f'{path} is no checkpoint that can be read ({type(error).__name__}): name another '
                         'run') from None
    meta = state.get('meta') if isinstance(state, dict) else None
    return from_meta(meta.get('tokenizer')) if isinstance(meta, dict) else None


def json_of_folder(folder):
    """The text of tokenizer.json; where only older files are there, what transformers makes of them."""
    path = os.path.join(folder, 'tokenizer.json')
    if os.path.exists(path):
        return read_text(path)
    found = [name for name in OTHER_LAYOUTS if os.path.isfile(os.path.join(folder, name))]
    if not found:
        return None
    transformers = need('transformers', f'{found[0]} in {folder}, which has no tokenizer.json,')
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False).backend_tokenizer.to_str()
    except Exception as error:  # whatever it lacks or finds: many classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f'{found[0]} in {folder} is a tokenizer that transformers cannot read ({reason}): '
                         'put its tokenizer.json there') from None


def ends_of(folder, tokenizer):
    """How texts begin and end, as arguments of HFTokenizer, from the files beside tokenizer.json."""
    settings, older, generation, config = (read_json(os.path.join(folder, name)) for name in (
        'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json', 'config.json'))

    def ids(which):
        """All ids that the files give to eos or bos."""
        tokens = [files.get(f'{which}_token') for files in (settings, older)]
        tokens = [token.get('content') if isinstance(token, dict) else token for token in tokens]
        found = [tokenizer.tokenizer.token_to_id(token) for token in tokens if isinstance(token, str)]
        for files, name in ((generation, 'generation_config.json'), (config, 'config.json')):
            value = files.get(f'{which}_token_id')
            listed = value if isinstance(value, list) else [value]
            if not all(x is None or type(x) is int for x in listed):
                raise ValueError(f'{which}_token_id={value} in {os.path.join(folder, name)} must be a token '
                                 'number or a list of them: correct it')
            found += listed
        # ids that the tokenizer lacks, -1 for example, stand for none
        return list(dict.fromkeys(i for i in found if is_id(i) and i < tokenizer.vocab_size))
    ends = ids('eos')
    # what tokenizer.json itself puts before a text comes first
    first, plain = tokenizer.prompt('a')[:1], tokenizer.encode('a')[:1]
    bos = first if first != plain else ids('bos')[:1]
    # transformers 4 obeyed add_bos_token where tokenizer.json puts nothing before a text, so the checkpoints
    # that have it (DeepSeek's) were trained and published with bos
    add = settings.get('add_bos_token') is True and bool(bos)
    return {'eot': ends[0] if ends else None, 'ends': ends, 'bos': bos[0] if bos else None, 'add_bos': add}


def read_text(path):
    """The text of a file, its line ends as they are, no byte order mark. ValueError if it is not UTF-8."""
    if os.path.isdir(path):
        raise ValueError(f'{path} must be a file, not a folder: name the file')
    try:
        with open(path, 'rb') as f:
            return f.read().decode().removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 (byte {error.start:,}): convert it or leave it out') from None


def read_json(path):
    """The dictionary in a JSON file, empty where there is no file."""
    if not os.path.exists(path):
        return {}
    if os.path.isdir(path):
        raise ValueError(f'{path} must be a file, not a folder: fetch it again')
    with open(path, encoding='utf-8') as f:
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path} is no JSON ({error}): fetch it again') from None
    if not isinstance(found, dict):
        raise ValueError(f'{path} must hold names and values: fetch it again')
    return found
