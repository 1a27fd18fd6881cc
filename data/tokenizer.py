"""
Text to token ids and back: bytes, characters, tiktoken's vocabularies, a small BPE trained on the spot.

Every tokenizer has

    vocab_size, eot       eot is the id that ends a document, or None
    encode(text)          -> list of ids
    decode(ids)           -> text; bytes that are not UTF-8 become U+FFFD
    prompt(text)          -> list of ids to continue; as encode, but for published checkpoints
    decode_bytes(ids)     -> bytes, for printing token by token: a character may span several tokens
    meta()                -> a dictionary of plain JSON types, from which `from_meta` builds it again

meta() is stored beside the tokens and in every checkpoint, so a model always comes with its tokenizer.

Text is always ordinary text: "<|endoftext|>" in it is encoded letter by letter, never as the special token.
A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
"""
import heapq
import importlib
import json
import os
import re
from collections import Counter, defaultdict

from .progress import Progress

EOT_BYTES = b'<|endoftext|>'

# Words, numbers of up to three digits, runs of punctuation, and white space, the last blank of which goes
# with the next word. Every character matches one of these, so the pieces joined are the text.
SPLIT = r' ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s'

# characters without white space, or of white space, that tiktoken gets at once
LONGEST_RUN = 25_000
LONG_RUN = re.compile(rf'(?<!\S)\S{{{LONGEST_RUN + 1},}}|(?<!\s)\s{{{LONGEST_RUN + 1},}}')

# distinct words that train_bpe counts at a time
MOST_WORDS = 2_000_000


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


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255, and 256 for the end of a document. It can encode every text."""

    vocab_size = 257
    eot = 256

    def encode(self, text):
        return list(utf8(text))

    prompt = encode

    def decode_bytes(self, ids):
        return b''.join(EOT_BYTES if i == self.eot else bytes([i]) for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors='replace')

    def meta(self):
        return {'kind': 'bytes'}


class CharTokenizer:
    """One id per character of a given text, in sorted order, as in nanoGPT. No token ends a document."""

    eot = None

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

    def decode_bytes(self, ids):
        return utf8(self.decode(ids))

    def meta(self):
        return {'kind': 'chars', 'chars': self.chars}


class TiktokenTokenizer:
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
        return [i for part in without_long_runs(text) for i in self.encoding.encode_ordinary(part)]

    prompt = encode

    def decode_bytes(self, ids):
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
        self.encoding = tiktoken.Encoding('bpe', pat_str=split, mergeable_ranks=ranks,
                                          special_tokens={EOT_BYTES.decode(): self.eot})

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
    if len(text) <= LONGEST_RUN:
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
    regex = need('regex', 'tokenizer=bpe')
    words, least = Counter(), 1
    for text in texts:
        for part in without_long_runs(text):
            words.update(regex.findall(SPLIT, part))
        while len(words) > MOST_WORDS:
            least += 1
            words = Counter({word: n for word, n in words.items() if n >= least})
    return words


def train_bpe(texts, n_merges):
    """The first `n_merges` tokens that byte-pair encoding learns from `texts`, in order.

    In each round the most frequent pair of neighbours becomes a token; of equally frequent pairs the smaller
    wins. This takes seconds for 12 MB: equal words are counted once, and a merge visits only the words that
    hold its pair.
    """
    words = count_words(texts)
    progress = Progress('training the vocabulary', n_merges)
    words, counts = [[bytes([byte]) for byte in utf8(word)] for word in words], list(words.values())
    pairs, where = count_pairs(words, counts)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    tokens = {}
    while heap and len(tokens) < n_merges:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            # an outdated entry: the count has fallen since, and another pair may be more frequent now
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if pairs[pair] < 2:
            break
        # two pairs can spell the same token, which then counts once
        tokens[b''.join(pair)] = None
        progress.add()
        changed = set()
        for i in where.pop(pair):
            before, words[i] = words[i], merge(words[i], pair)
            for old in zip(before, before[1:]):
                pairs[old] -= counts[i]
            for new in zip(words[i], words[i][1:]):
                pairs[new] += counts[i]
                where[new].add(i)
                changed.add(new)
        for new in changed:
            heapq.heappush(heap, (-pairs[new], new))
    progress.close()
    return [token.decode('latin-1') for token in tokens]


def count_pairs(words, counts):
    """({pair of neighbours: occurrences}, {pair: indices of the words that hold it})"""
    pairs, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    return pairs, where


def merge(word, pair):
    """The list `word` with every occurrence of `pair` joined into one token, from the left."""
    out, i = [], 0
    while i < len(word):
        n = 2 if tuple(word[i:i + 2]) == pair else 1
        out.append(b''.join(word[i:i + n]))
        i += n
    return out


class HFTokenizer:
    """The vocabulary of a published checkpoint: its tokenizer.json, run by the tokenizers library.

    `prompt` adds the tokens that the checkpoint expects before a text, such as Llama's <|begin_of_text|>.
    `decode` is the library's, which may drop a blank that the vocabulary puts before a text; `decode_bytes`
    keeps it.
    """

    def __init__(self, json_text, eot=None):
        tokenizers = need('tokenizers', 'the tokenizer of a checkpoint')
        self.json, self.eot = json_text, eot
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f'tokenizer.json is not understood ({error}): fetch it again') from None
        # ids may have gaps
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        # a token spells its bytes in GPT-2's alphabet, or as text in which <0x0A> stands for a byte
        decoder = json.loads(json_text).get('decoder') or {}
        steps = {step['type'] for step in (decoder, *decoder.get('decoders', ())) if 'type' in step}
        self.bytes_of = byte_alphabet() if 'ByteLevel' in steps else None

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, text):
        return self.tokenizer.encode(text).ids

    def decode_bytes(self, ids):
        return b''.join(map(self.token_bytes, ids))

    def token_bytes(self, i):
        token = self.tokenizer.id_to_token(i) or ''
        if self.bytes_of:
            # as the library does, a special token too is read as bytes if the alphabet has all its characters
            spelt = [self.bytes_of.get(char) for char in token]
            return utf8(token) if None in spelt else bytes(spelt)
        if re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes([int(token[3:5], 16)])
        return utf8(token.replace('\u2581', ' '))

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def meta(self):
        return {'kind': 'tokenizers', 'json': self.json, 'eot': self.eot}


def byte_alphabet():
    """{character: byte} of GPT-2's vocabulary: a printable byte is itself, the others are U+0100 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def from_meta(meta):
    """The tokenizer that `tokenizer.meta()` described."""
    kind = meta.get('kind')
    if kind == 'bytes':
        return ByteTokenizer()
    if kind == 'chars':
        return CharTokenizer(meta['chars'])
    if kind == 'tiktoken':
        return TiktokenTokenizer(meta['name'])
    if kind == 'bpe':
        return BPETokenizer(meta['tokens'], meta['split'])
    if kind == 'tokenizers':
        return HFTokenizer(meta['json'], meta['eot'])
    raise ValueError(f'tokenizer kind {kind!r} is unknown: it must be bytes, chars, tiktoken, bpe or '
                     'tokenizers')


def from_folder(folder):
    """The tokenizer of a checkpoint in Hugging Face format: its tokenizer.json, or None where it has none."""
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        return None
    with open(path, encoding='utf-8') as f:
        text = f.read()
    tokenizer = HFTokenizer(text)
    for name, key in (('tokenizer_config.json', 'eos_token'), ('generation_config.json', 'eos_token_id'),
                      ('config.json', 'eos_token_id')):
        end = read_json(os.path.join(folder, name)).get(key)
        if isinstance(end, list):
            end = end[0] if end else None
        end = end.get('content') if isinstance(end, dict) else end
        end = tokenizer.tokenizer.token_to_id(end) if isinstance(end, str) else end
        if end is not None:
            return HFTokenizer(text, end)
    return tokenizer


def read_text(path):
    """The text of a file, its line ends as they are, no byte order mark. ValueError if it is not UTF-8."""
    try:
        with open(path, 'rb') as f:
            return f.read().decode().removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 (byte {error.start:,}): convert it or leave it out') from None


def read_json(path):
    """The dictionary in a JSON file, empty where there is no file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as f:
        try:
            found = json.load(f)
        except ValueError as error:
            raise ValueError(f'{path} is no JSON ({error}): fetch it again') from None
    if not isinstance(found, dict):
        raise ValueError(f'{path} must hold names and values: fetch it again')
    return found
