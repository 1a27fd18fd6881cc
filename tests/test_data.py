"""Data: texts survive tokenizers, rows depend on their number alone, nothing half made or damaged is taken.

Tests that need GPT-2's vocabulary look for it in TIKTOKEN_CACHE_DIR, else in ../shared/tiktoken_cache.
"""

import errno
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import tokenizer as tokenizers  # noqa: E402
from data.common import preparation  # noqa: E402
from data.encoding import encoded  # noqa: E402
from data.hub import Stream  # noqa: E402
from data.loader import check_hashes, ensure_prepared, mix, open_dataset, permute  # noqa: E402
from data.progress import Progress  # noqa: E402
from data.reading import Corpus, in_pieces  # noqa: E402
from data.tokenizer import (  # noqa: E402
    SPLIT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    from_meta,
    train_bpe,
    utf8,
)
from data.writer import write_dataset  # noqa: E402

VOCABULARIES = Path(os.environ.get('TIKTOKEN_CACHE_DIR', ROOT.parent / 'shared' / 'tiktoken_cache'))
PREPARE_TEXT = ROOT / 'data' / 'text' / 'prepare.py'
SHAKESPEARE = ROOT.parent / 'shared' / 'data' / 'tinyshakespeare.txt'
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f'no {SHAKESPEARE}')

ODD_TEXTS = ['', ' ', '\n', '\r\n', 'a\r\nb\rc\n\n  d\t', '\x00\x01\x7f', '\ufeffstart', 'e\u0301 \u0301',
             '\u200d', '👩‍👩‍👧 🏳️‍🌈', '漢字かな交じり', 'שלום مرحبا', '<|endoftext|>',
             'x<|endoftext|><|fim_prefix|>y', 'aaaaaaa' * 99, ' ' * 2000 + 'x', '\n' * 999,
             '12345678901 ½ ² Ⅷ', '\U0010ffff\ue000\ufffd', "don't  we'll\u00a0\u2003x"]


def random_texts(n, seed=0):
    """Texts of characters from all over Unicode, without surrogates, which are no text."""
    rng = random.Random(seed)
    alphabets = [range(32, 127), range(0, 256), range(0, 0xD800), range(0xE000, 0x110000), [9, 10, 13, 32]]
    lengths = [rng.randrange(60) for _ in range(n)]
    return [''.join(chr(rng.choice(rng.choice(alphabets))) for _ in range(length)) for length in lengths]


@pytest.fixture(scope='module')
def gpt2():
    if not VOCABULARIES.is_dir():
        pytest.skip(f"no folder {VOCABULARIES} with GPT-2's vocabulary")
    os.environ['TIKTOKEN_CACHE_DIR'] = str(VOCABULARIES)
    try:
        return TiktokenTokenizer('gpt2')
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(params=['bytes', 'chars', 'bpe', 'gpt2'])
def tokenizer(request):
    if request.param == 'gpt2':
        return request.getfixturevalue('gpt2')
    return {'bytes': ByteTokenizer, 'chars': lambda: CharTokenizer(''.join(ODD_TEXTS + random_texts(300))),
            'bpe': lambda: BPETokenizer.train([Path(__file__).read_text()], 400)}[request.param]()


# ----------------------------------------------------------------------------
# tokenizers

def test_encoding_and_decoding_gives_the_text_back(tokenizer):
    for text in ODD_TEXTS + random_texts(300):
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


def test_text_never_becomes_the_end_of_document_token(tokenizer):
    assert tokenizer.eot not in tokenizer.encode('a<|endoftext|>b')
    if tokenizer.eot is not None:
        assert tokenizer.decode([tokenizer.eot]) == '<|endoftext|>'


def test_bytes_that_are_not_text_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([0xE6, 65]) == '\ufffdA'


def test_lone_surrogates_become_replacement_characters(tokenizer):
    if isinstance(tokenizer, CharTokenizer):
        tokenizer = CharTokenizer('a\ud800b')
        assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a\ud800b'
        assert tokenizer.decode_bytes(tokenizer.encode('\ud800')) == '\ufffd'.encode()
    else:
        assert tokenizer.decode(tokenizer.encode('a\ud800b\udfff')) == 'a\ufffdb\ufffd'


def test_meta_is_json_and_builds_the_same_tokenizer(tokenizer):
    again = from_meta(json.loads(json.dumps(tokenizer.meta())))
    assert type(again) is type(tokenizer) and again.meta() == tokenizer.meta()
    assert (again.vocab_size, again.eot) == (tokenizer.vocab_size, tokenizer.eot)
    for text in ODD_TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_unknown_characters_kinds_and_names_are_refused():
    with pytest.raises(ValueError, match=r"no 'xz': leave"):
        CharTokenizer('abc').encode('abzxa')
    with pytest.raises(ValueError, match="kind 'words' is unknown"):
        from_meta({'kind': 'words'})
    with pytest.raises(ValueError, match="tokenizer='gpt9' is unknown: choose one of bytes, chars, bpe, "):
        TiktokenTokenizer('gpt9')
    with pytest.raises(ValueError, match='vocab_size=256 must be at least 257'):
        BPETokenizer.train(['abc'], 256)


def test_a_vocabulary_that_cannot_be_fetched_names_the_folder_to_set(monkeypatch, tmp_path):
    def offline(*args):
        raise ConnectionError('no network')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr('tiktoken.load.read_file', offline)
    with pytest.raises(OSError, match="'p50k_base' cannot be fetched .* TIKTOKEN_CACHE_DIR"):
        TiktokenTokenizer('p50k_base')


def test_bytes_and_characters_need_no_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(ValueError, match='pip install tiktoken'):
        BPETokenizer([])
    for meta in {'kind': 'bytes'}, {'kind': 'chars', 'chars': 'abc'}:
        tokenizer = from_meta(meta)
        assert tokenizer.decode(tokenizer.encode('cab')) == 'cab'


def naive_bpe(texts, n_merges):
    """Byte-pair encoding from its definition: count all pairs, merge the most frequent, begin again."""
    import regex
    words = [[bytes([byte]) for byte in utf8(word)] for text in texts for word in regex.findall(SPLIT, text)]
    tokens = []
    while len(tokens) < n_merges:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if b''.join(best) not in tokens:
            tokens.append(b''.join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [b''.join(best)]
                i += 1
    return tokens


def test_trained_bpe_equals_naive_bpe():
    rng = random.Random(1)
    for _ in range(150):
        alphabet = rng.choice(['ab', 'ab ', 'aab\n ', 'abcdé漢 1', '0123456789 x'])
        texts = [''.join(rng.choices(alphabet, k=rng.randrange(80))) for _ in range(rng.randrange(1, 5))]
        n_merges = rng.randrange(1, 40)
        tokens = [token.encode('latin-1') for token in train_bpe(texts, n_merges)]
        assert tokens == naive_bpe(texts, n_merges), texts


def test_trained_bpe_equals_naive_bpe_on_a_real_text():
    text = Path(inspect.__file__).read_text()[:12_000]
    assert [token.encode('latin-1') for token in train_bpe([text], 120)] == naive_bpe([text], 120)


def test_blanks_are_the_white_space_of_the_pattern():
    import regex
    assert set(tokenizers.BLANKS) == set(regex.findall(r'\s', ''.join(map(chr, range(0xD800)))
                                                       + ''.join(map(chr, range(0xE000, 0x110000)))))


def test_words_are_counted_as_the_pattern_divides_each_text(monkeypatch):
    """In units and in few at a time, with blanks of all kinds in front, behind and alone."""
    import regex
    rng = random.Random(3)
    alphabet = ['a', 'bc', ' ', '  ', '\n', '\r\n', '\t', '12', '3', '.', '漢', 'é', '\x1c', '\xa0', '\u3000']
    for most in (3, tokenizers.MOST_UNITS):
        monkeypatch.setattr(tokenizers, 'MOST_UNITS', most)
        for _ in range(150):
            texts = [''.join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(rng.randrange(4))]
            want = Counter(word for text in texts for word in regex.findall(SPLIT, text))
            assert tokenizers.count_words(texts) == want, texts


def test_only_the_rarest_words_are_forgotten(monkeypatch):
    monkeypatch.setattr(tokenizers, 'MOST_WORDS', 10)
    monkeypatch.setattr(tokenizers, 'MOST_UNITS', 10)
    texts = ['often enough ' * 50, *(f'{chr(97 + i)}{chr(98 + j)} ' for i in range(20) for j in range(20))]
    words = tokenizers.count_words(texts)
    assert words[' often'] == 49 and words[' enough'] == 50 and len(words) < 25


def test_long_runs_are_found_wherever_they_begin(monkeypatch):
    monkeypatch.setattr(tokenizers, 'LONGEST_RUN', 10)
    monkeypatch.setattr(tokenizers, 'LONG_RUN', re.compile(r'(?<!\S)\S{11,}|(?<!\s)\s{11,}'))
    rng = random.Random(4)
    for _ in range(500):
        text = ''.join(rng.choice('x ') * rng.randrange(1, 16) for _ in range(rng.randrange(9)))
        parts = tokenizers.without_long_runs(text)
        assert ''.join(parts) == text
        assert all(len(run) <= 10 for part in parts for run in re.findall(r'\S+|\s+', part)), text


def test_bpe_encodes_by_merging_the_lowest_rank_first():
    import regex
    text = Path(__file__).read_text()
    tokenizer = BPETokenizer.train([text], 500)
    ranks = {token.encode('latin-1'): 256 + i for i, token in enumerate(tokenizer.tokens)}
    expected = []
    for word in regex.findall(SPLIT, text[:9000]):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not found:
                break
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        expected += [ranks.get(part, part[0]) for part in parts]
    assert tokenizer.encode(text[:9000]) == expected
    assert tokenizer.vocab_size == 500 and len(expected) < 0.6 * 9000


def test_bpe_of_a_text_without_pairs_is_smaller_than_asked():
    assert BPETokenizer.train(['abc'], 1000).vocab_size == 257


# ----------------------------------------------------------------------------
# writer

DOCUMENTS = [('val' if i % 5 == 0 else 'train', text) for i, text in enumerate(random_texts(200, seed=2))]


def write(folder, documents=DOCUMENTS, **kwargs):
    return write_dataset(folder, documents, kwargs.pop('tokenizer', ByteTokenizer()), 'a test', **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_counts_and_hashes_of_meta_are_those_of_the_files(tmp_path):
    meta = write(tmp_path)
    assert sorted(contents(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    assert (meta['dtype'], meta['vocab_size'], meta['tokenizer']) == ('uint16', 257, {'kind': 'bytes'})
    for split in ('train', 'val'):
        texts = [text for name, text in DOCUMENTS if name == split and text]
        raw = (tmp_path / f'{split}.bin').read_bytes()
        assert np.frombuffer(raw, '<u2').tolist() == [i for text in texts for i in [*text.encode(), 256]]
        assert meta['files'][split] == {f'{split}.bin': len(raw) // 2}
        assert meta[f'{split}_tokens'] == len(raw) // 2
        assert meta[f'{split}_documents'] == len(texts)
        assert meta[f'{split}_bytes'] == len(raw) // 2 - len(texts)
        assert meta['sha256'][split] == hashlib.sha256(raw).hexdigest()
    assert meta['val_bytes_per_token'] == meta['val_bytes'] / meta['val_tokens']


def test_documents_are_not_ended_without_an_end_token_or_when_asked_not_to(tmp_path):
    assert write(tmp_path, append_eot=False)['val_bytes_per_token'] == 1
    chars = CharTokenizer(''.join(text for _, text in DOCUMENTS))
    n_chars = sum(len(text) for split, text in DOCUMENTS if split == 'train')
    assert write(tmp_path, tokenizer=chars)['train_tokens'] == n_chars


@pytest.mark.parametrize('vocab_size, dtype', [(65536, 'uint16'), (65537, 'uint32')])
def test_large_vocabularies_take_four_bytes(tmp_path, vocab_size, dtype):
    text = ''.join(chr(0x10000 + i) for i in range(vocab_size))
    meta = write(tmp_path, [('train', text), ('val', text)], tokenizer=CharTokenizer(text))
    assert meta['dtype'] == dtype
    assert (tmp_path / 'train.bin').stat().st_size == np.dtype(dtype).itemsize * vocab_size
    x, y = open_dataset(tmp_path, vocab_size - 1, 0).train_batch(0, 1)
    assert y[0].tolist() == list(range(1, vocab_size))


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match='the val split of .* is empty'):
        write(tmp_path, [('train', 'abc'), ('val', '')])
    assert not (tmp_path / 'meta.json').exists()


class Killed(BaseException):
    pass


def interrupted(documents, n):
    for i, document in enumerate(documents):
        if i == n:
            raise Killed
        yield document


def test_an_interrupted_preparation_is_not_a_dataset(tmp_path):
    with pytest.raises(Killed):
        write(tmp_path, interrupted(DOCUMENTS, 150))
    with pytest.raises(FileNotFoundError, match='has not been prepared'):
        open_dataset(tmp_path, 8, 0)
    write(tmp_path)
    assert sorted(contents(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_an_interrupted_preparation_leaves_the_old_dataset_as_it_was(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(Killed):
        write(tmp_path, interrupted(reversed(DOCUMENTS), 150))
    after = contents(tmp_path)
    assert before == {name: after[name] for name in before}


def test_files_of_an_earlier_preparation_are_removed(tmp_path):
    write(tmp_path, shard_tokens=500)
    assert 'train_003.bin' in contents(tmp_path)
    (tmp_path / 'train_notes.bin').write_text('not ours')
    write(tmp_path)
    assert sorted(contents(tmp_path)) == ['meta.json', 'train.bin', 'train_notes.bin', 'val.bin']


@pytest.fixture(scope='module')
def web(tmp_path_factory):
    """A small corpus of three files, as .parquet and as .jsonl."""
    import pyarrow
    import pyarrow.parquet
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ('parquet', 'jsonl')}
    for i in range(3):
        rows = [{'id': n, 'text': text} for n, text in enumerate(random_texts(500, seed=10 + i))]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folders['parquet'] / f'{i}.parquet', row_group_size=70)
        (folders['jsonl'] / f'{i}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folders


def stream(folder):
    from datasets import load_dataset
    files = sorted(str(path) for path in folder.iterdir())
    kind = 'json' if files[0].endswith('.jsonl') else 'parquet'
    return Stream(load_dataset(kind, data_files=files, split='train', streaming=True), val_fraction=0.1)


@pytest.mark.parametrize('kind', ['parquet', 'jsonl'])
def test_a_killed_stream_goes_on_and_gives_identical_files(web, tmp_path, kind):
    def prepare(name, kill=None):
        documents, seen = stream(web[kind]), [0]

        class Tokenizer(ByteTokenizer):
            def encode(self, text):
                seen[0] += 1
                if seen[0] == kill:
                    raise Killed
                return super().encode(text)

        write(tmp_path / name, documents, tokenizer=Tokenizer(), shard_tokens=9000, save_every=2000)
        return seen[0]

    total = prepare('whole')
    whole = contents(tmp_path / 'whole')
    assert len(whole) > 6 and 'val_000.bin' in whole
    for kill in (1, 333, 501, total):
        for again in (7, kill // 2 or 1):
            with pytest.raises(Killed):
                prepare(f'at{kill}', again)
        with pytest.raises(Killed):
            prepare(f'at{kill}', kill if kill < 334 else 334)
        assert prepare(f'at{kill}') <= total
        assert contents(tmp_path / f'at{kill}') == whole, kill
    # And it did go on: the last attempt had little left to do.
    with pytest.raises(Killed):
        prepare('late', total)
    assert prepare('late') < 60
    assert contents(tmp_path / 'late') == whole


def test_progress_with_other_settings_or_lost_files_is_not_continued(web, tmp_path, capsys):
    class Broken(Stream):
        def __iter__(self):
            return interrupted(super().__iter__(), 800)

    def killed(folder, **settings):
        with pytest.raises(Killed):
            write(folder, Broken(stream(web['parquet']).rows, val_fraction=0.1), save_every=2000, **settings)

    killed(tmp_path / 'a', shard_tokens=5000)
    killed(tmp_path / 'b')
    (tmp_path / 'b' / 'train.bin.tmp').unlink()
    killed(tmp_path / 'c')
    os.truncate(tmp_path / 'c' / 'train.bin.tmp', 100)
    killed(tmp_path / 'd')
    (tmp_path / 'd' / 'progress.json').write_text('{"settings"')
    for name, text in ('e', '[]'), ('f', '{}'), ('g', '{"settings": {}, "splits": {"train": 1}}'):
        killed(tmp_path / name)
        (tmp_path / name / 'progress.json').write_text(text)
    write(tmp_path / 'whole', stream(web['parquet']))
    for name in 'abcdefg':
        capsys.readouterr()
        write(tmp_path / name, stream(web['parquet']), save_every=2000)
        assert contents(tmp_path / name) == contents(tmp_path / 'whole'), name
        reason = {'a': 'another shard_tokens', 'b': 'train.bin.tmp is missing or too short',
                  'c': 'train.bin.tmp is missing or too short'}.get(name, 'progress.json is damaged')
        assert f'cannot be resumed ({reason}): beginning anew' in capsys.readouterr().out


def test_a_file_system_without_flush_and_locks_holds_a_dataset(tmp_path, monkeypatch, capsys):
    """As some network and FUSE file systems. That two preparations are not kept apart there is said."""
    import fcntl

    def refused(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    write(tmp_path / 'a', [('train', 'one'), ('val', 'two')])
    monkeypatch.setattr(os, 'fsync', refused)
    monkeypatch.setattr(fcntl, 'flock', refused)
    with preparation(tmp_path / 'b', overwrite=False) as folder:
        write(folder, [('train', 'one'), ('val', 'two')])
    assert contents(tmp_path / 'b') == contents(tmp_path / 'a')
    assert 'has no locks: start no second preparation there' in capsys.readouterr().out


# ----------------------------------------------------------------------------
# loader

def dataset(folder, n_train=1000, n_val=500, T=16, seed=0, **kwargs):
    """A dataset in which the token at place i is i, so that a row tells where it began."""
    if not (folder / 'meta.json').exists():
        text = ''.join(map(chr, range(0x10000, 0x10000 + max(n_train, n_val))))
        train = [('train', text[i:min(i + 100, n_train)]) for i in range(0, n_train, 100)]
        write(folder, [*train, ('val', text[:n_val])], tokenizer=CharTokenizer(text), **kwargs)
    return open_dataset(folder, T, seed)


def starts(data, first_row, n_rows):
    x, y = data.train_batch(first_row, n_rows)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (n_rows, data.block_size)
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(data.block_size)) and torch.equal(y, x + 1)
    return x[:, 0].tolist()


def test_permutations_are_bijections_that_depend_on_the_key():
    for n in [*range(1, 130), 1000, 1009, 4096, 4097, 30011]:
        index, keys = np.arange(n, dtype=np.uint64), (0, 1, 2**64 - 1)
        orders = [permute(index, n, np.full(n, key, np.uint64)) for key in keys]
        for order in orders:
            assert np.array_equal(np.sort(order), np.arange(n)), n
        assert n < 20 or len({tuple(order) for order in orders}) == 3


def test_every_window_goes_everywhere_equally_often():
    n, n_keys = 7, 7000
    keys = mix(np.arange(n_keys, dtype=np.uint64))
    for i in range(n):
        counts = np.bincount(permute(np.full(n_keys, i, np.uint64), n, keys).astype(np.int64), minlength=n)
        # Five standard deviations.
        assert np.abs(counts - n_keys / n).max() < 5 * (n_keys / n) ** 0.5, counts


@pytest.mark.parametrize('n_train', [17, 18, 31, 32, 33, 47, 48, 49, 1000, 1001, 1007])
def test_an_epoch_holds_every_window_once(tmp_path, n_train):
    T, data = 16, dataset(tmp_path, n_train)
    W, shifts = max(1, (n_train - T) // T), set()
    for epoch in range(60):
        found = sorted(starts(data, epoch * W, W))
        shifts.add(found[0])
        assert found == list(range(found[0], found[0] + W * T, T))
        assert 0 <= found[0] < min(T, n_train - T) and found[-1] + T < n_train
    # 60 draws: every shift is seen where there are two, and most where there are sixteen.
    assert len(shifts) >= min(T, n_train - T) * 0.7


def test_rows_depend_on_seed_and_number_alone(tmp_path):
    data = dataset(tmp_path)
    rows = starts(data, 0, 300)
    again = dataset(tmp_path)
    assert [start for i in range(290, -10, -10) for start in starts(again, i, 10)][::-1] != rows
    assert [start for i in range(0, 300, 10) for start in starts(again, i, 10)] == rows
    assert starts(again, 123, 1) == rows[123:124]
    for seed in (1, -1, 2**63):
        assert starts(dataset(tmp_path, seed=seed), 0, 300) != rows
    assert rows[:61] != rows[61:122], 'the second epoch has its own order'


def test_rows_of_a_seed_never_change(tmp_path):
    # A checkpoint resumes with the batches that it would have seen only if these stay as they are.
    assert starts(dataset(tmp_path, seed=1337), 58, 8) == [211, 339, 803, 155, 539, 571, 683, 59]
    assert len(starts(dataset(tmp_path), 10**15, 3)) == 3


def test_ranks_and_micro_batches_make_up_one_batch(tmp_path):
    data = dataset(tmp_path)
    x, y = data.train_batch(40, 24)
    for n in (1, 6, 12):
        parts = [data.train_batch(40 + i, n) for i in range(0, 24, n)]
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_cutting_a_split_into_files_changes_no_row(tmp_path):
    whole, cut = dataset(tmp_path / 'whole'), dataset(tmp_path / 'cut', shard_tokens=90)
    assert len(cut.meta['files']['train']) == 10
    assert whole.meta['sha256'] == cut.meta['sha256']
    assert starts(whole, 0, 200) == starts(cut, 0, 200)
    # Windows longer than a file.
    whole, cut = dataset(tmp_path / 'whole', T=350), dataset(tmp_path / 'cut', T=350)
    assert starts(whole, 0, 50) == starts(cut, 0, 50)


def test_reading_leaves_global_generators_alone(tmp_path):
    data = dataset(tmp_path)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    data.train_batch(0, 100), list(data.eval_batches(4, None))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def windows(data, batch_size, max_tokens, rank=0, world=1):
    found = []
    for x, y in data.eval_batches(batch_size, max_tokens, rank, world):
        assert 0 < len(x) <= batch_size and x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x, x[:, :1] + torch.arange(data.block_size)) and torch.equal(y, x + 1)
        found += x[:, 0].tolist()
    return found


@pytest.mark.parametrize('max_tokens', [None, 0, 1, 16, 17, 100, 250, 499, 10**9])
def test_evaluation_windows_do_not_depend_on_batch_size_or_world(tmp_path, max_tokens):
    data = dataset(tmp_path)
    found = windows(data, 1, max_tokens)
    # 499 tokens have a successor: 31 whole windows.
    assert len(found) == (31 if max_tokens is None else min(31, max(1, max_tokens // 16)))
    assert found[0] == 0 and found[-1] + 16 < 500
    gaps = set(np.diff(found).tolist())
    assert not gaps or min(gaps) >= 16 and max(gaps) - min(gaps) <= 16, 'no overlap, evenly spaced'
    for batch_size in (2, 7, 100):
        assert windows(data, batch_size, max_tokens) == found
        for world in (2, 3, 40):
            shares = [windows(data, batch_size, max_tokens, rank, world) for rank in range(world)]
            assert sorted(sum(shares, [])) == found
            assert shares == [found[rank::world] for rank in range(world)]
    assert windows(dataset(tmp_path, seed=9), 4, max_tokens) == found


def edit_meta(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


@pytest.mark.parametrize('file, change, error, sentence', [
    ('meta.json', lambda path: (path.unlink(), (path.parent / 'val.bin').unlink()), FileNotFoundError,
     'has not been prepared: run python data/text/prepare.py '),
    ('train.bin', Path.unlink, FileNotFoundError, r'train.bin is missing: prepare it again, python data/'),
    ('val.bin', Path.unlink, FileNotFoundError, r'val.bin is missing'),
    ('train.bin', lambda path: os.truncate(path, 1999), ValueError, '1,999 bytes, not the 1,000 tokens of 2'),
    ('val.bin', lambda path: os.truncate(path, 2000), ValueError, '2,000 bytes, not the 500 tokens of 2'),
    ('meta.json', lambda path: path.write_text('{"a": 1'), ValueError, r'is broken \(JSONDecodeError'),
    ('meta.json', lambda path: path.write_text('[]'), ValueError, 'meta.json is broken'),
    ('meta.json', lambda path: path.write_text('{}'), ValueError, r"is broken \(KeyError: 'vocab_size'"),
    ('meta.json', lambda path: path.write_bytes(b'\xff\xfe'), ValueError, 'meta.json is broken'),
    ('meta.json', edit_meta(dtype='float32'), ValueError, r"meta.json is broken \(KeyError: 'float32'"),
    ('meta.json', edit_meta(files={'train': {'train.bin': 1000}}), ValueError, r"broken \(KeyError: 'val'"),
    ('meta.json', edit_meta(files=['train.bin']), ValueError, 'meta.json is broken'),
    ('meta.json', lambda path: (path.unlink(), path.mkdir()), ValueError, 'broken .IsADirectoryError'),
    ('train.bin', lambda path: (path.unlink(), path.mkdir()), FileNotFoundError, 'train.bin is missing'),
    ('meta.json', lambda path: path.write_text('[' * 10**5), ValueError, 'broken .RecursionError'),
    *[('meta.json', edit_meta(**{name: value}), ValueError, rf'broken \({name}=.* must {rule}')
      for name, values, rule in [
          ('vocab_size', [0, -1, None, '257', 257.0, True, 10**12], 'be an int above 0'),
          ('vocab_size', [256, 300], 'be the size of its tokenizer'),
          ('val_bytes_per_token', [0, None, math.nan, math.inf, -1, '1', True], 'be a finite number above 0'),
          ('prompt', [3, None], 'be a string'),
          ('sha256', [3, [], {'train': 3}, {'other': 'x'}], 'give each split a checksum'),
          ('files', [{'train': {}, 'val': {'val.bin': 500}},
                     *[{'train': {'train.bin': n}, 'val': {'val.bin': 500}} for n in (0, -1, None, 1e3)]],
           'give each split files'),
          ('files', [{'train': {name: 1000}, 'val': {'val.bin': 500}} for name in ('../x', 'a/b', '..')],
           'name files of this folder'),
          ('tokenizer', [{'kind': 'tiktoken', 'name': 3}, {'kind': 'chars', 'chars': ['a']}, {'kind': []},
                         {'kind': 'bpe', 'split': 3, 'tokens': []}], 'hold kind'),
          ('tokenizer', [{'kind': 'bpe', 'split': '', 'tokens': [1]}], 'hold a list of tokens')]
      for value in values],
    *[('meta.json', edit_meta(tokenizer=value), ValueError, 'meta.json is broken')
      for value in [None, 3, [], {}, {'kind': 'chars'}]],
])
def test_damaged_datasets_are_refused_in_a_sentence(tmp_path, file, change, error, sentence):
    dataset(tmp_path)
    change(tmp_path / file)
    with pytest.raises(error, match=sentence) as caught:
        open_dataset(tmp_path, 16, 0)
    assert '\n' not in str(caught.value)


def test_a_dataset_that_cannot_be_read_now_is_not_called_broken(tmp_path, monkeypatch):
    """The remedy of a broken one would replace it."""
    dataset(tmp_path)

    def denied(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    monkeypatch.setattr(Path, 'read_bytes', denied)
    with pytest.raises(PermissionError):
        open_dataset(tmp_path, 16, 0)


def test_the_remedy_of_a_damaged_dataset_works(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('abc ' * 99)
    folder = tmp_path / "an odd; name's"
    prepare_text(monkeypatch, tmp_path, path='a.txt', out=folder.name)
    for damage in (lambda path: [x.unlink() for x in (path, folder / 'val.bin')],
                   lambda path: path.write_text('{}')):
        damage(folder / 'meta.json')
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_dataset(folder, 8, 0)
        command = str(caught.value).partition('python ')[2].replace('YOUR_TEXT', str(tmp_path / 'a.txt'))
        command = f'{sys.executable} {command}'
        assert not subprocess.run(f'{command} --tokenizer=bytes', shell=True, cwd=ROOT).returncode
        assert open_dataset(folder, 8, 0)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    write(tmp_path, tokenizer=BPETokenizer([]))
    check_hashes(tmp_path)
    edit_meta(vocab_size=200)(tmp_path / 'meta.json')
    with pytest.raises(ValueError, match='vocab_size=200 in .* must be above all tokens, and .* holds 2'):
        check_hashes(tmp_path)


def test_missing_and_short_datasets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist: run python data/text/.* --out=.*nowhere'):
        open_dataset(tmp_path / 'nowhere', 16, 0)
    with pytest.raises(ValueError, match='block_size=1000 must be less than the 1,000 tokens of the train'):
        dataset(tmp_path, T=1000)
    with pytest.raises(ValueError, match='block_size=500 must be less than the 500 tokens of the val split'):
        dataset(tmp_path, T=500)
    assert starts(dataset(tmp_path, T=499), 0, 3) and windows(dataset(tmp_path, T=499), 4, None) == [0]


def test_a_large_file_is_neither_read_nor_permuted_in_full(tmp_path):
    n_tokens = 10_000_000_000
    dataset(tmp_path)
    with open(tmp_path / 'train.bin', 'r+b') as file:
        file.truncate(2 * n_tokens)
    edit_meta(files={'train': {'train.bin': n_tokens}, 'val': {'val.bin': 500}})(tmp_path / 'meta.json')
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    data = open_dataset(tmp_path, 256, 0)
    for row in range(0, 10**10, 10**8):
        data.train_batch(row, 8)
    seconds = time.perf_counter() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss) / 1024
    assert data.n_windows == (n_tokens - 256) // 256
    assert seconds < 2 and megabytes < 100, (seconds, megabytes)


def test_a_small_batch_costs_little(tmp_path):
    data, times = dataset(tmp_path, T=64), []
    for i in range(500):
        start = time.perf_counter()
        data.train_batch(12 * i, 12)
        times.append(time.perf_counter() - start)
    # Below 0.1 ms where it was written; the bound leaves room for a busy machine.
    assert min(times) < 5e-4, min(times)


def test_only_an_offline_dataset_is_prepared_unasked(tmp_path):
    for name in ('openwebtext', 'pysource'):
        folder = tmp_path / name
        folder.mkdir()
        # What an interrupted preparation leaves.
        (folder / 'train.bin.tmp').write_bytes(b'1234')
        (folder / 'progress.json').write_text('{}')
        (folder / 'prepare.py').write_text(
            'import pathlib, time\nfolder = pathlib.Path(__file__).parent\ntime.sleep(0.3)\n'
            'open(folder / "log", "a").write("x")\n(folder / "meta.json").write_text("{}")\n')
    with pytest.raises(FileNotFoundError, match='not been prepared: run python data/openwebtext/prepare.py'):
        ensure_prepared(tmp_path / 'openwebtext')
    # Two at once, as the processes of one run come: one prepares, the other waits.
    code = f'from data.loader import ensure_prepared; ensure_prepared({str(tmp_path / "pysource")!r})'
    processes = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / 'pysource' / 'log').read_text() == 'x'
    (tmp_path / 'pysource' / 'meta.json').unlink()
    (tmp_path / 'pysource' / 'prepare.py').write_text('raise SystemExit(3)')
    with pytest.raises(ValueError, match='prepare.py failed'):
        ensure_prepared(tmp_path / 'pysource')


# ----------------------------------------------------------------------------
# prepare scripts

def prepare(monkeypatch, name, *flags):
    """Run data/<name>/prepare.py with these flags; returns the sentence or status it exits with, or None."""
    script = ROOT / 'data' / name / 'prepare.py'
    monkeypatch.setattr(sys, 'argv', [str(script), *map(str, flags)])
    try:
        runpy.run_path(str(script), run_name='__main__')
    except SystemExit as stop:
        return stop.code


def texts_of(folder, split):
    """The documents of a split, decoded; the last may lack its end token."""
    meta = json.loads((folder / 'meta.json').read_text())
    tokenizer = from_meta(meta['tokenizer'])
    ids = np.concatenate([np.fromfile(folder / name, '<u2') for name in meta['files'][split]])
    ends = np.flatnonzero(ids == tokenizer.eot).tolist() if tokenizer.eot else []
    documents = [ids[a:b] for a, b in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)])]
    return [tokenizer.decode(document.tolist()) for document in documents if len(document)]


def test_pysource_holds_the_standard_library(tmp_path):
    # As a user runs it, from another folder.
    script, library = ROOT / 'data' / 'pysource' / 'prepare.py', Path(sysconfig.get_paths()['stdlib'])
    start = time.perf_counter()
    for flags in ['--tokenizer=bytes'], ['--vocab_size=300']:
        command = [sys.executable, script, f'--out={tmp_path}', '--overwrite=True', *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert 'documents' in done.stdout and str(tmp_path) in done.stdout
        train, val = texts_of(tmp_path, 'train'), texts_of(tmp_path, 'val')
        assert (library / 'argparse.py').read_bytes().decode() in train + val
        assert 0.02 < len(val) / len(train + val) < 0.1
        assert sum(map(len, train)) > 5_000_000 and not set(train) & set(val)
    meta = open_dataset(tmp_path, 64, 0).meta
    assert meta['vocab_size'] == 300 and meta['val_bytes_per_token'] > 1.2
    assert time.perf_counter() - start < 40


@needs_shakespeare
def test_shakespeare_has_nanogpts_counts(tmp_path, monkeypatch, gpt2):
    prepare(monkeypatch, 'shakespeare_char', f'--input={SHAKESPEARE}', f'--out={tmp_path / "a"}')
    prepare(monkeypatch, 'shakespeare', f'--input={SHAKESPEARE}', f'--out={tmp_path / "b"}')
    counts = [open_dataset(tmp_path / name, 64, 0).meta for name in 'ab']
    assert [(meta['vocab_size'], meta['train_tokens'], meta['val_tokens']) for meta in counts] == [
        (65, 1_003_854, 111_540), (50257, 301_966, 36_059)]
    text = SHAKESPEARE.read_bytes().decode()
    assert texts_of(tmp_path / 'a', 'train') == [text[:1_003_854]]
    assert texts_of(tmp_path / 'a', 'val') == [text[1_003_854:]]


def test_a_download_is_kept_and_a_failed_one_names_the_way_out(tmp_path, monkeypatch):
    source = tmp_path / 'source.txt'
    text, flag = 'To be, or not to be.\r\n' * 30, f'--out={tmp_path / "out"}'
    source.write_bytes(text.encode())
    urlopen = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, 'urlopen', lambda url, timeout: urlopen('file:///nowhere'))
    message = prepare(monkeypatch, 'shakespeare_char', flag)
    assert 'cannot be downloaded' in message and '--input=FILE' in message
    monkeypatch.setattr(urllib.request, 'urlopen', lambda url, timeout: urlopen(source.as_uri()))
    assert prepare(monkeypatch, 'shakespeare_char', flag) is None
    source.unlink()
    assert prepare(monkeypatch, 'shakespeare_char', flag, '--overwrite=True') is None
    assert texts_of(tmp_path / 'out', 'train') + texts_of(tmp_path / 'out', 'val') == [text[:594], text[594:]]


def test_web_corpora_survive_kill_and_come_out_the_same(tmp_path, monkeypatch, capsys):
    script = ROOT / 'data' / 'openwebtext' / 'prepare.py'
    texts = random_texts(20_000, seed=3)
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    flags = [f'--input={tmp_path / "rows.jsonl"}', '--tokenizer=bytes', '--shard_tokens=300000',
             '--save_every=150000', '--val_fraction=0.05']
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    process = subprocess.Popen([sys.executable, script, f'--out={killed}', *flags], stderr=subprocess.DEVNULL)
    while not (killed / 'progress.json').exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match='has not been prepared'):
        open_dataset(killed, 8, 0)
    assert prepare(monkeypatch, 'openwebtext', f'--out={whole}', *flags) is None
    assert 'resuming in' not in capsys.readouterr().out
    assert prepare(monkeypatch, 'openwebtext', f'--out={killed}', *flags) is None
    assert 'resuming in' in capsys.readouterr().out
    assert contents(killed) == contents(whole)
    assert sorted(texts_of(whole, 'train') + texts_of(whole, 'val')) == sorted(filter(None, texts))


def test_web_corpora_take_local_files_and_a_number_of_documents(web, tmp_path, monkeypatch, gpt2):
    flags = f'--input={web["parquet"]}', f'--out={tmp_path}', '--val_fraction=0.1', '--max_documents=300'
    assert prepare(monkeypatch, 'fineweb_edu', *flags) is None
    meta = open_dataset(tmp_path, 8, 0).meta
    texts = [text for text in random_texts(500, seed=10)[:300] if text]
    assert meta['tokenizer'] == {'kind': 'tiktoken', 'name': 'gpt2'} and meta['train_documents'] < len(texts)
    assert sorted(texts_of(tmp_path, 'train') + texts_of(tmp_path, 'val')) == sorted(texts)
    for flags, sentence in [([f'--input={ROOT / "docs"}'], 'all .jsonl or all .parquet'),
                            ([f'--input={web["jsonl"]}', '--column=body'], 'choose one of id, text'),
                            ([f'--input={web["jsonl"]}', '--column=id'], "no text in column 'id'"),
                            (['--tokenizer=bpe'], 'needs a pass over all text')]:
        assert sentence in prepare(monkeypatch, 'openwebtext', f'--out={tmp_path / "other"}', *flags)


def test_a_hub_out_of_reach_names_the_ways_out(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")
    monkeypatch.setattr('datasets.load_dataset', offline)
    message = prepare(monkeypatch, 'fineweb_edu', f'--out={tmp_path}', '--tokenizer=bytes')
    assert 'HuggingFaceFW/fineweb-edu cannot be opened' in message and '--input=PATH' in message
    assert '\n' not in message


@pytest.mark.parametrize('kind', ['txt', 'md', 'py', 'jsonl', 'parquet', 'other'])
@pytest.mark.parametrize('as_folder', [True, False])
def test_text_takes_every_kind_of_file(tmp_path, monkeypatch, kind, as_folder):
    texts = [text + ' the end of it' for text in random_texts(120)]
    path = tmp_path / 'in' / 'deep' / f'one.{kind}'
    path.parent.mkdir(parents=True)
    if kind == 'jsonl':
        path.write_text(''.join(json.dumps({'body': text}) + '\n\n' for text in texts))
    elif kind == 'parquet':
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({'n': range(120), 'body': texts}), path)
    else:
        path.write_bytes(''.join(texts).encode())
    (tmp_path / 'in' / '.git').mkdir()
    (tmp_path / 'in' / '.git' / 'hidden.txt').write_text('hidden')
    flags = f'--input={tmp_path / "in" if as_folder else path}', f'--out={tmp_path / "out"}', '--column=body'
    stop = prepare(monkeypatch, 'text', *flags, '--vocab_size=300')
    if kind == 'other' and as_folder:
        assert 'a folder that holds .txt' in stop
        return
    assert stop is None
    train, val = texts_of(tmp_path / 'out', 'train'), texts_of(tmp_path / 'out', 'val')
    if kind in ('jsonl', 'parquet'):
        assert sorted(train + val) == sorted(texts) and 2 <= len(val) <= 30
    else:
        whole = ''.join(texts)
        assert train == [whole[:int(len(whole) * 0.9)]] and train + val == [train[0], whole[len(train[0]):]]


@pytest.mark.parametrize('name', ['bytes', 'chars', 'bpe', 'gpt2'])
def test_text_takes_every_tokenizer(tmp_path, monkeypatch, name, request):
    if name == 'gpt2':
        request.getfixturevalue('gpt2')
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(f'{i} is a number, and z{i} a name. ' * 20)
    flags = f'--input={tmp_path}', f'--out={tmp_path / "out"}', f'--tokenizer={name}', '--val_fraction=0.2'
    assert prepare(monkeypatch, 'text', *flags) is None
    meta = open_dataset(tmp_path / 'out', 8, 0).meta
    assert meta['tokenizer']['kind'] == {'gpt2': 'tiktoken'}.get(name, name)
    text = ''.join((tmp_path / f'{i}.txt').read_text() for i in range(3))
    assert len(''.join(texts_of(tmp_path / 'out', 'train'))) == pytest.approx(len(text) * 0.8, abs=3)


@pytest.mark.parametrize('files, flags, sentence', [
    ({}, [], 'must be a file, or a folder that holds .txt'),
    ({}, ['--input='], 'input must be set to a file or a folder: --input=PATH'),
    ({'a.txt': b'abc'}, ['--val_fraction=2'], 'val_fraction=2.0 must be above 0 and below 1'),
    ({'a.txt': b'fine \xff'}, [], 'a.txt is not UTF-8 (byte 5): convert it or leave it out'),
    ({'a.jsonl': b'{"text": "x"}\n{"body": 1}'}, [], "line 2 of {}/a.jsonl has no column 'text'"),
    ({'a.jsonl': b'{"text": "x"}\noops'}, [], 'line 2 of {}/a.jsonl is not JSON'),
    ({'a.jsonl': b'{"text": "x"}\n[1]'}, [], "line 2 of {}/a.jsonl has no column 'text'"),
    ({'a.jsonl': b'{"text": "x"}\n{"text": 3}'}, [], "row 2 of {}/a.jsonl has no text in column"),
    ({'a.txt': b'abc'}, ['--tokenizer=gpt9'], "tokenizer='gpt9' is unknown: choose one of bytes, chars, bpe"),
    ({'a.txt': b'abc'}, ['--vocab_size=9'], 'vocab_size=9 must be at least 257'),
    ({'a.txt': b'abc'}, ['--name=pysource'], 'name=pysource must be a plain name that no other'),
    ({'a.txt': b'abc'}, ['--name=../x'], 'name=../x must be a plain name'),
    ({'a.txt': b''}, [], 'the train split of {}/out is empty'),
])
def test_text_that_cannot_be_taken_is_refused_in_a_sentence(tmp_path, monkeypatch, files, flags, sentence):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    message = prepare(monkeypatch, 'text', f'--input={tmp_path}', f'--out={tmp_path / "out"}', *flags)
    assert sentence.replace('{}', str(tmp_path)) in message and '\n' not in message
    assert not (tmp_path / 'out' / 'meta.json').exists()


def test_a_missing_column_of_a_table_names_the_columns(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({'id': [1], 'body': ['x']}), tmp_path / 'a.parquet')
    message = prepare(monkeypatch, 'text', f'--input={tmp_path}', f'--out={tmp_path / "out"}')
    assert "a.parquet has no column 'text': choose one of id, body with --column=" in message


@pytest.mark.parametrize('name, flag, sentence', [
    ('text', '--vocab_size=many', '--vocab_size=many must be an int (default 2048)'),
    ('text', '--val_fraction=nan', '--val_fraction=nan must be a finite number (default 0.1)'),
    ('text', '--input', '--input needs a value; write --input=VALUE'),
    ('pysource', '--tokenizer=chars',
     'tokenizer=chars must be bytes or bpe: the text has thousands of characters'),
    ('pysource', '--vocab=9', '--vocab is no setting of THIS; did you mean --vocab_size?'),
    ('shakespeare', '--inptu=x', '--inptu is no setting of THIS; did you mean --input?'),
    ('shakespeare_char', '--inptu=x', '--inptu is no setting of THIS; did you mean --input?'),
    ('openwebtext', '--max_documents=x', '--max_documents=x must be an int or None (default None)'),
    ('openwebtext', '--val_fraction=1', 'val_fraction=1.0 must be above 0 and below 1'),
    ('fineweb_edu', '--URL=x', '--URL is no setting of THIS; see --help'),
])
def test_a_bad_flag_is_answered_with_one_sentence(monkeypatch, name, flag, sentence):
    flags = ['--input=x'] if name == 'text' else []
    assert prepare(monkeypatch, name, *flags, flag) == sentence.replace('THIS', f'data/{name}/prepare.py')


SCRIPTS = [path.parent.name for path in sorted(ROOT.glob('data/*/prepare.py'))]


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_says_what_the_dataset_is(monkeypatch, capsys, name):
    assert prepare(monkeypatch, name, '-h') == prepare(monkeypatch, name, '--help') == 0
    usage, about, *rest = capsys.readouterr().out.split('\n\n')
    files = ' [config/FILE.py ...]' * (name == 'pysource')  # the others read files, by --input
    assert usage.startswith(f'usage: python data/{name}/prepare.py{files} [--key=value ...]')
    assert len(about) > 60 and f'    python data/{name}/prepare.py' in rest[0]
    lines = [line for line in '\n\n'.join(rest).splitlines() if line.startswith('    --')]
    assert "    --out=''" in [line[:12] for line in lines]
    assert all(len(line.split('   ', 2)[-1]) > 10 for line in lines), 'every setting has a meaning'


def test_flags_of_prepare_scripts_take_dashes_and_blanks(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('abc ' * 500)
    assert prepare(monkeypatch, 'text', '--input', tmp_path / 'a.txt', '--vocab-size', 300, '--out',
                   tmp_path / 'out', '--val_fraction', 0.25) is None
    meta = open_dataset(tmp_path / 'out', 8, 0).meta
    assert meta['source'] == 'a.txt, 0.25 for validation' and meta['tokenizer']['kind'] == 'bpe'


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert prepare(monkeypatch, 'openwebtext', f'--out={tmp_path}', '--tokenizer=bytes') == (
        'repo=Skylion007/openwebtext needs datasets: pip install datasets')


def test_a_file_given_without_its_flag_is_not_run_as_a_config(tmp_path):
    (tmp_path / 'mine.py').write_text("raise SystemExit('this ran')")
    done = subprocess.run([sys.executable, ROOT / 'data' / 'text' / 'prepare.py', 'mine.py'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == 'mine.py is no flag; did you mean --input=mine.py?'


# ----------------------------------------------------------------------------
# what is read, and what is not

def prepare_text(monkeypatch, tmp_path, *flags, path='in', tokenizer='bytes', out='out'):
    """Prepare tmp_path / path; returns the sentence of a refusal, or the documents of both splits, sorted."""
    flags = f'--input={tmp_path / path}', f'--out={tmp_path / out}', f'--tokenizer={tokenizer}', *flags
    stop = prepare(monkeypatch, 'text', *flags)
    return stop or sorted(texts_of(tmp_path / out, 'train') + texts_of(tmp_path / out, 'val'))


def test_a_folder_is_read_through_links_and_what_is_passed_over_is_counted(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'in'
    (tmp_path / 'far' / '.git').mkdir(parents=True)
    (folder / 'deep').mkdir(parents=True)
    files = {'NOTES.TXT': 'capitals', 'a.txt': 'plain', 'deep/c.html': 'no', 'deep/d.html': 'no', 'e': 'no',
             '../far/linked.txt': 'linked', '../far/.git/x.txt': 'no', '.hidden.txt': 'no',
             'z.Md': 'markdown'}
    for name, text in files.items():
        (folder / name).write_text(text * 9)
    (folder / 'linked').symlink_to(tmp_path / 'far')
    (tmp_path / 'far' / 'circle').symlink_to(folder)
    (folder / 'gone.txt').symlink_to(tmp_path / 'nowhere')
    found = prepare_text(monkeypatch, tmp_path, '--val_fraction=0.5')
    out = capsys.readouterr().out
    assert len(''.join(found)) == sum(9 * len(text) for text in files.values() if text != 'no')
    assert 'reading 4 files: 3 .txt, 1 .md' in out, out
    for passed in ('2 .html', '1 file without an ending', '1 hidden folder', '1 hidden file',
                   '1 broken link or device', '1 folder linked twice'):
        assert passed in out, out


ROWS = [f'row {i} of "many", with, commas\nand lines; \u00fc \U0001f642' for i in range(120)]


def table(kind, rows):
    """The bytes of a file of this kind with a column `text`."""
    import csv
    import io
    dicts = [{'id': i, 'text': text} for i, text in enumerate(rows)]
    if kind in ('csv', 'tsv', 'semicolons'):
        out = io.StringIO()
        writer = csv.writer(out, delimiter={'csv': ',', 'tsv': '\t', 'semicolons': ';'}[kind])
        writer.writerows([('id', 'text'), *((row['id'], row['text']) for row in dicts)])
        return out.getvalue().encode()
    lines = '\n'.join(map(json.dumps, dicts))
    texts = {'lines': lines, 'array': json.dumps(dicts, indent=1), 'strings': json.dumps(rows),
             'data': json.dumps({'version': 1, 'data': dicts}),
             'one': json.dumps({'text': ''.join(rows)}, indent=1)}
    return texts[kind].encode()


@pytest.mark.parametrize('name, kind', [
    ('rows.JSONL', 'lines'), ('rows.ndjson', 'lines'), ('rows.json', 'array'), ('rows.json', 'lines'),
    ('rows.json', 'strings'), ('rows.json', 'data'), ('rows.csv', 'csv'), ('rows.CSV', 'semicolons'),
    ('rows.tsv', 'tsv')])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
def test_tables_of_every_kind_give_their_rows(tmp_path, monkeypatch, name, kind, mark):
    (tmp_path / name).write_bytes(mark + table(kind, ROWS))
    assert prepare_text(monkeypatch, tmp_path, path=name) == sorted(ROWS)
    chars = prepare_text(monkeypatch, tmp_path, path=name, tokenizer='chars', out='chars')
    assert set(''.join(chars)) == set(''.join(ROWS))


def test_one_json_object_is_one_document(tmp_path, monkeypatch):
    (tmp_path / 'one.json').write_bytes(table('one', ROWS))
    assert ''.join(reversed(prepare_text(monkeypatch, tmp_path, path='one.json'))) == ''.join(ROWS)


@pytest.mark.parametrize('packing', ['gz', 'bz2', 'xz', 'zst'])
@pytest.mark.parametrize('name, kind', [('a.jsonl', 'lines'), ('a.csv', 'csv'), ('a.json', 'array'),
                                        ('a.txt', '')])
def test_packed_files_are_read_and_damaged_ones_refused(tmp_path, monkeypatch, packing, name, kind):
    import bz2
    import gzip
    import lzma
    if packing == 'zst':
        zstandard = pytest.importorskip('zstandard')
    pack = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress,
            'zst': lambda raw: zstandard.ZstdCompressor().compress(raw)}[packing]
    raw = pack(table(kind, ROWS) if kind else '\n<|endoftext|>\n'.join(ROWS).encode())
    (tmp_path / f'{name}.{packing}').write_bytes(raw)
    found = prepare_text(monkeypatch, tmp_path, path=f'{name}.{packing}')
    assert found == sorted(ROWS) if kind else [text.strip('\n') for text in found] == sorted(ROWS)
    (tmp_path / f'{name}.{packing}').write_bytes(raw[:len(raw) // 2])
    stop = prepare_text(monkeypatch, tmp_path, path=f'{name}.{packing}', out='damaged')
    assert 'is damaged' in stop and '\n' not in stop


def test_a_zst_file_that_was_cut_is_not_taken_for_a_short_one(tmp_path, monkeypatch):
    """Of several frames, as the tool's parallel mode writes; zlib has the same reader of a frame."""
    from types import SimpleNamespace
    from zlib import compress, decompressobj
    package = SimpleNamespace(ZstdDecompressor=lambda: SimpleNamespace(decompressobj=decompressobj))
    monkeypatch.setitem(sys.modules, 'compression', None)
    monkeypatch.setitem(sys.modules, 'zstandard', package)
    text = ' '.join(map(str, range(200_000)))
    packed = compress(text[:500_000].encode()) + compress(text[500_000:].encode())
    (tmp_path / 'a.txt.zst').write_bytes(packed)
    assert ''.join(part.text for part in Corpus(tmp_path / 'a.txt.zst')) == text
    for cut in (1, 3, len(packed) // 2, len(packed) - 1):
        (tmp_path / 'a.txt.zst').write_bytes(packed[:cut])
        with pytest.raises(ValueError, match='a.txt.zst is damaged .it ends amid a frame'):
            list(Corpus(tmp_path / 'a.txt.zst'))


def test_a_csv_row_may_end_with_empty_fields(tmp_path):
    (tmp_path / 'a.csv').write_text('id,text\n1,one,\n2,two,,\n')
    assert [part.text for part in Corpus(tmp_path / 'a.csv')] == ['one', 'two']


def test_a_package_for_zst_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / 'a.txt.zst').write_bytes(b'(\xb5/\xfd')
    for module in ('compression', 'zstandard'):
        monkeypatch.setitem(sys.modules, module, None)
    assert prepare_text(monkeypatch, tmp_path, path='a.txt.zst') == (
        'a file that ends in .zst needs zstandard: pip install zstandard')


@pytest.mark.parametrize('name, content, sentence', [
    ('a.json', b'[{"text": "x"}, {"text": ', 'a.json is not JSON'),
    ('a.json', b'[{"text": "x"}] trailing', 'a.json is not JSON'),
    ('a.json', b'{"a": 1, "b": 2}', "value 1 of {}/a.json has no column 'text': choose one of a, b"),
    ('a.json', b'[' * 100_000, 'a.json is not JSON'),
    ('a.jsonl', b'{"a":' * 100_000, 'line 1 of {}/a.jsonl is not JSON'),
    ('a.json', b'\xff', 'a.json is not UTF-8 (byte 0)'),
    ('a.csv', b'id,body\n1,x', "a.csv has no column 'text': choose one of id, body"),
    ('a.csv', b'id,text\n1,"x', 'a.csv is not CSV (unexpected end of data)'),
    ('a.csv', b'id,text\n1,\xff', 'a.csv is not UTF-8'),
    ('a.csv', b'id,text\n1,x\n2,a b, and c', "a.csv is not CSV (row 2 has 3 fields, not 2: a text with ','"),
    ('a.parquet', b'PAR1', 'a.parquet is no parquet file'),
    ('a.zip', b'PK', 'a.zip must be unpacked first'), ('a.tar.gz', b'', 'a.tar.gz must be unpacked first'),
    ('a.txt.gz', b'plain', 'a.txt.gz is damaged'),
])
def test_files_that_are_not_what_they_are_called_are_refused(tmp_path, monkeypatch, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    stop = prepare_text(monkeypatch, tmp_path, path=name)
    assert sentence.replace('{}', str(tmp_path)) in stop and '\n' not in stop


def test_the_settings_of_a_program_are_no_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'package.json').write_text(json.dumps({'name': 'x', 'keywords': ['one', 'two']}))
    (tmp_path / 'in' / 'rows.json').write_bytes(table('data', ROWS))
    assert prepare_text(monkeypatch, tmp_path) == sorted(ROWS)
    assert "passed over: 1 .json that hold no rows with a 'text'" in capsys.readouterr().out


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('abc ' * 99)

    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('data.writer.SplitWriter.add', full)
    stop = prepare_text(monkeypatch, tmp_path, path='a.txt')
    assert stop.startswith(f'{tmp_path}/out cannot be written (No space left on device): make room')


def test_rows_without_text_are_passed_over_and_counted(tmp_path, monkeypatch, capsys):
    import pyarrow
    import pyarrow.parquet
    rows = [None if i in (7, 70) else text for i, text in enumerate(ROWS)]
    pyarrow.parquet.write_table(pyarrow.table({'text': rows}), tmp_path / 'a.parquet')
    rows[70] = ''
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in rows))
    for name in 'a.parquet', 'b.jsonl':
        assert prepare_text(monkeypatch, tmp_path, path=name, out=name[0]) == sorted(filter(None, rows))
        assert 'passed over: 2 rows without text' in capsys.readouterr().out
        flags = f'--input={tmp_path / name}', '--tokenizer=bytes', '--val_fraction=0.1'
        assert prepare(monkeypatch, 'fineweb_edu', *flags, f'--out={tmp_path / name}s') is None
        assert 'passed over: 2 rows without text' in capsys.readouterr().out


def test_lines_with_a_marker_part_documents(tmp_path, monkeypatch, capsys):
    stories = [f'Once there was cat {i}.\nIt said <|endoftext|> here.\n' for i in range(300)]
    (tmp_path / 'a.txt').write_text('<|endoftext|>\r\n' + '<|endoftext|> \n'.join(stories) + '<|endoftext|>')
    assert prepare_text(monkeypatch, tmp_path, path='a.txt') == sorted(stories)
    assert '<|endoftext|> stands 300 times amid other text' in capsys.readouterr().out


def test_a_text_that_is_cut_is_not_ended_there(tmp_path, monkeypatch):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        (tmp_path / 'in' / f'{i}.txt').write_text(f'abcdefghi{i}' * 10)
    prepare_text(monkeypatch, tmp_path)
    train, val = (np.fromfile(tmp_path / 'out' / f'{split}.bin', '<u2') for split in ('train', 'val'))
    assert 256 not in train and np.flatnonzero(val == 256).tolist() == [10, 21, 32]
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert (meta['train_documents'], meta['val_documents']) == (3, 3)


def test_a_dataset_is_replaced_only_when_asked(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('abc ' * 99)
    (tmp_path / 'b.txt').write_text('xyz ' * 99)
    prepare_text(monkeypatch, tmp_path, path='a.txt')
    before = contents(tmp_path / 'out')
    stop = prepare_text(monkeypatch, tmp_path, path='b.txt')
    assert 'add --overwrite=True' in stop and contents(tmp_path / 'out') == before
    assert 'x' in ''.join(prepare_text(monkeypatch, tmp_path, '--overwrite=True', path='b.txt'))


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.txt').write_text('abc ' * 99)
    prepare_text(monkeypatch, tmp_path, path='a.txt', out="an odd; name's")
    command = capsys.readouterr().out.splitlines()[-1].removeprefix('next: ')
    echo = subprocess.run(f'printf "%s\\n" {command}', shell=True, capture_output=True, text=True).stdout
    python, script, flag = echo.splitlines()
    assert (ROOT / 'train.py').samefile(script) and flag == f"--dataset={tmp_path}/an odd; name's"


# ----------------------------------------------------------------------------
# several at once, and interrupted

SLOW = '''
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from data.common import preparation
from data.tokenizer import ByteTokenizer
from data.writer import write_dataset
def documents():
    for i in range(100):
        Path(__file__).with_name('alive').touch()
        time.sleep(0.1)
        yield ('val' if i % 5 == 0 else 'train'), 'text' * 9
with preparation(Path(__file__).parent, overwrite=True) as folder:
    write_dataset(folder, documents(), ByteTokenizer(), 'slow')
'''


def slow_dataset(folder):
    """A folder whose prepare.py writes for ten seconds."""
    folder.mkdir()
    (folder / 'prepare.py').write_text(SLOW.replace('{root!r}', repr(str(ROOT))))
    return folder


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f'{path} did not come')


def test_a_second_preparation_of_a_folder_is_refused_until_the_first_is_gone(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('abc ' * 99)
    folder = slow_dataset(tmp_path / 'out')
    first = subprocess.Popen([sys.executable, folder / 'prepare.py'])
    try:
        wait_for(folder / 'train.bin.tmp')
        stop = prepare_text(monkeypatch, tmp_path, path='a.txt')
        assert 'must be used by one preparation at a time' in stop and not (folder / 'meta.json').exists()
    finally:
        first.kill()
        first.wait()
    assert prepare_text(monkeypatch, tmp_path, path='a.txt')
    assert not (folder / 'prepare.lock').exists()


def test_many_preparations_of_a_folder_leave_one_of_them(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text(f'{i}' * 10_000 * (i + 1))
    for _ in range(3):
        command = [sys.executable, PREPARE_TEXT, '--overwrite=True', f'--out={tmp_path}/out',
                   '--tokenizer=bytes']
        processes = [subprocess.Popen([*command, f'--input={tmp_path}/{i}.txt'], stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL) for i in range(4)]
        assert 0 in [process.wait() for process in processes]
        assert len(set(''.join(texts_of(tmp_path / 'out', 'train')))) == 1
        check_hashes(tmp_path / 'out')


@pytest.mark.parametrize('kill', [signal.SIGTERM, signal.SIGKILL])
def test_the_preparation_of_a_first_run_ends_with_the_run(tmp_path, kill):
    folder = slow_dataset(tmp_path / 'pysource')
    code = f'from data.loader import ensure_prepared; ensure_prepared({str(folder)!r})'
    run = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    wait_for(folder / 'alive')
    run.send_signal(kill)
    assert run.wait() == -kill
    time.sleep(0.3)
    (folder / 'alive').unlink()
    time.sleep(0.5)
    assert not (folder / 'alive').exists() and not (folder / 'meta.json').exists()


def hear_ctrl_c():
    """In a child: SIGINT as a terminal has it. A shell that starts the tests in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_preparation_says_so(tmp_path):
    folder = slow_dataset(tmp_path / 'pysource')
    process = subprocess.Popen([sys.executable, folder / 'prepare.py'], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, preexec_fn=hear_ctrl_c)
    wait_for(folder / 'train.bin.tmp')
    process.send_signal(signal.SIGINT)
    out = process.communicate()[0]
    assert process.returncode == 130 and out.strip() == (
        f'interrupted before the dataset in {folder} was complete; the same command begins anew')
    with pytest.raises(FileNotFoundError):
        open_dataset(folder, 8, 0)


def test_an_interrupt_of_the_imports_is_a_sentence_too(tmp_path):
    (tmp_path / 'numpy.py').write_text('import time\nprint("importing", flush=True)\ntime.sleep(20)')
    process = subprocess.Popen([sys.executable, PREPARE_TEXT], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {'PYTHONPATH': str(tmp_path)},
                               preexec_fn=hear_ctrl_c)
    assert process.stdout.readline() == 'importing\n'
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].strip() == 'interrupted: nothing has been prepared'


def test_a_console_that_is_gone_stops_no_preparation(tmp_path):
    (tmp_path / 'a.txt').write_text('abc ' * 99)
    command = [sys.executable, PREPARE_TEXT, f'--input={tmp_path / "a.txt"}', f'--out={tmp_path / "out"}',
               '--tokenizer=bytes']
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 0 and not done.stderr
    assert open_dataset(tmp_path / 'out', 8, 0)


def test_a_long_preparation_shows_how_far_it_is(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    progress = Progress('writing tokens', 1000)
    for _ in range(100):
        now[0] += 1
        progress.add(10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[1] == 'writing tokens: 15%, about 85 s left', lines


# ----------------------------------------------------------------------------
# long texts

def test_long_texts_are_cut_where_their_tokens_end(gpt2, monkeypatch):
    monkeypatch.setattr('data.reading.PIECE', 300)
    text = Path(inspect.__file__).read_text()[:60_000]
    text = text.replace('return', 'r\u00e9turn \u6f22\u5b57. \r\n\r\n  x')
    bpe = BPETokenizer.train([text], 600)
    for tokenizer in gpt2, bpe, ByteTokenizer():
        pieces = [ids for ids, _ in encoded(text, tokenizer)]
        assert len(pieces) > 90 and sum(pieces, []) == tokenizer.encode(text)
    chunks = [text[i:i + 77] for i in range(0, len(text), 77)]
    assert BPETokenizer.train(in_pieces(chunks), 600).tokens == bpe.tokens


@pytest.mark.parametrize('run', [' ', 'x', '\n', '\u3042', '= '])
def test_a_run_of_a_million_characters_is_encoded(run, gpt2):
    text = 'begin ' + run * 1_200_000 + ' end'
    for tokenizer in gpt2, BPETokenizer.train([text], 300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('kind', ['one text', 'one text of wide characters', 'many rows', 'one array'])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    line = 'A line of a long book about nothing at all.\n'
    wide = '\U0001f642' if 'wide' in kind else ''

    def write_input(n):
        path = tmp_path / ('a.txt' if 'text' in kind else 'a.jsonl' if kind == 'many rows' else 'a.json')
        with open(path, 'w') as file:
            if kind == 'one array':
                file.write('[' + ','.join(json.dumps({'text': line * 9}) for _ in range(n // 9)) + ']')
            else:
                row = line if 'text' in kind else json.dumps({'text': line}) + '\n'
                file.writelines([wide] + n * [row])
        return path

    def peak(n):
        code = ('import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3); '
                'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
        command = [sys.executable, PREPARE_TEXT, f'--input={write_input(n)}', f'--out={tmp_path}/{n}',
                   '--vocab_size=300']
        return int(subprocess.check_output([sys.executable, '-c', code, *command])) / 1024
    assert peak(200_000) < peak(2_000) + 20  # MB, for 9 MB of text
