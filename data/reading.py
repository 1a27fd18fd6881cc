"""
From files to documents: which files of a folder hold text, and the documents in each.

    .txt .md .py               a document, or several, parted by lines that hold <|endoftext|> alone
    .jsonl .ndjson .json       a row each, with the text in one column
    .csv .tsv .parquet         the same
    any of these but .parquet  also packed: .gz .bz2 .xz, and .zst where Python or a package can unpack it

Files are streamed: a document comes in pieces of about PIECE characters, so that a file of any size takes the
same memory.
"""
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from .tokenizer import need

PIECE = 1 << 18
TEXTS = ('.txt', '.md', '.py')
TABLES = ('.jsonl', '.ndjson', '.json', '.csv', '.tsv', '.parquet')
PACKED = ('.gz', '.bz2', '.xz', '.zst')
ARCHIVES = ('.zip', '.tar', '.tgz', '.7z', '.rar')

MARKER = '<|endoftext|>'
BLANKS, BETWEEN_ITEMS = re.compile(r'\s*'), re.compile(r'[\s,]*')
# greedy, so that the last place is found
AFTER_WORD, AFTER_ANY = re.compile(r'.*[^\W_](?=\s)', re.S), re.compile(r'.*\S(?=\s)', re.S)
MARKER_LINE = re.compile(rf'(?:(?<=\n)|\A)[ \t]*{re.escape(MARKER)}[ \t]*(?:\r?\n|\Z)')


class Part(NamedTuple):
    """A piece of a document."""
    name: str           # of the document: its path below the root, and its number where there are several
    text: str
    last: bool = True   # the document ends here


class Corpus:
    """
    The documents of a file or a folder, as `Part`s, sorted by path. `kinds` and `passed_over` count files,
    `nulls` and `markers` what the last iteration met: rows without text, null or empty, and markers amid a
    line.

    Raises ValueError for what cannot be read.
    """

    def __init__(self, root, column='text', on_bytes=None, flag='column', setting='input'):
        """flag: the one that names the column; setting: that names the root"""
        self.root, self.column, self.flag = Path(root), column, flag
        self.on_bytes = on_bytes or (lambda n: None)
        self.passed_over, self.nulls, self.markers, self.no_rows = Counter(), 0, 0, 0
        if not self.root.exists():
            raise ValueError(f'{setting}={root} does not exist: give a file, or a folder of '
                             f'{kinds_in_words()}')
        self.paths = sorted(self._find()) if self.root.is_dir() else [self.root]
        if not self.paths:
            found = f', not only {in_words(self.passed_over)}' if self.passed_over else ''
            raise ValueError(f'{setting}={root} must be a file, or a folder that holds '
                             f'{kinds_in_words()}{found}')
        kind = kind_of(self.paths[0])
        if kind[0] in ARCHIVES or packed_parquet(kind):
            raise ValueError(f'{setting}={root} must be unpacked first: unpack it, and give what was in it')
        self.kinds = Counter(''.join(kind_of(path)) or 'plain text' for path in self.paths)
        self.size = sum(path.stat().st_size for path in self.paths)

    def _find(self):
        """Yields the files to read below the root, through links; counts the others."""
        seen = set()
        for folder, subfolders, files in os.walk(self.root, onerror=refuse, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or a second link
                self.passed_over['folder linked twice'] += 1
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            self.passed_over['hidden folder'] += sum(name.startswith('.') for name in subfolders)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
            for name in files:
                path = Path(folder, name)
                kind = kind_of(path)
                if name.startswith('.'):
                    self.passed_over['hidden file'] += 1
                elif not path.is_file():
                    self.passed_over['broken link or device'] += 1
                elif kind[0] in TEXTS + TABLES and not packed_parquet(kind):
                    yield path
                else:
                    self.passed_over[''.join(kind) or 'file without an ending'] += 1
        self.passed_over += Counter()  # drops the zeros

    def __iter__(self):
        self.nulls = self.markers = self.no_rows = 0
        for path in self.paths:
            name = path.relative_to(self.root).as_posix()
            kind, packing = kind_of(path)
            if kind not in TABLES:
                yield from self._documents(name, self._chunks(path))
                continue
            for number, text in enumerate(self._texts(path, kind, packing), 1):
                if text:
                    yield self._part(f'{name}:{number}', text)
                else:
                    self.nulls += 1

    def pairs(self, other):
        """
        Yields (text, text) of the rows of tables, in this column and in that of `other`, a Corpus of the same
        files. Rows without one of them are passed over and counted in `nulls`.
        """
        self.nulls = 0
        for path in self.paths:
            kind, packing = kind_of(path)
            if kind not in TABLES:
                raise ValueError(f'input={path} must hold rows with two columns, as {" ".join(TABLES)} do: '
                                 'name another file, or leave it out of the folder')
            for pair in zip(self._texts(path, kind, packing), other._texts(path, kind, packing)):
                if all(pair):
                    yield pair
                else:
                    self.nulls += 1

    def _chunks(self, path):
        """The text of a file, its line ends as they are, in chunks; without a byte order mark."""
        decoder, done = codecs.getincrementaldecoder('utf-8')(), 0
        with unpacked(path, self.on_bytes) as file:
            while True:
                raw = file.read(PIECE)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(raw, not raw)
                except UnicodeDecodeError as error:
                    raise not_utf8(path, done - held + error.start) from None
                yield text.removeprefix('\ufeff') if done == 0 else text
                done += len(raw)
                if not raw:
                    return

    def _documents(self, name, chunks):
        """The parts of a text file, in which a line that holds the marker alone ends a document."""
        number, begun, several, before = 1, False, False, ''
        for piece in in_pieces(chunks):
            # the last character before a piece says whether the piece begins a line
            text = before + piece
            *ended, rest = MARKER_LINE.split(text) if MARKER in text else [text]
            texts = [*ended, rest]
            texts[0] = texts[0].removeprefix(before)
            *ended, rest = texts
            before = piece[-1]
            several = several or bool(ended)
            for text in ended:
                if begun or text.strip():
                    yield self._part(f'{name}:{number}', text)
                    number += 1
                begun = False
            if rest and (begun or not several or rest.strip()):
                yield self._part(f'{name}:{number}' if several else name, rest, last=False)
                begun = True
        if begun:
            yield Part(f'{name}:{number}' if several else name, '')

    def _part(self, name, text, last=True):
        self.markers += text.count(MARKER)
        return Part(name, text, last)

    def _texts(self, path, kind, packing):
        """The text of each row of a table, or None."""
        for number, text in enumerate(self._rows(path, kind, packing), 1):
            if text is not None and not isinstance(text, str):
                raise ValueError(f'row {number} of {path} has no text in column {self.column!r} but '
                                 f'{shown(text)}: mend it, or choose another column with --{self.flag}=')
            yield text

    def _rows(self, path, kind, packing):
        """What the column holds in each row of a table."""
        if kind == '.parquet':
            return self._parquet_rows(path)
        if kind in ('.csv', '.tsv'):
            return self._csv_rows(path)
        return self._json_rows(path) if kind == '.json' else self._jsonl_rows(path)

    def _jsonl_rows(self, path):
        with unpacked(path, self.on_bytes) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise not_json(f'line {number} of {path}') from None
                yield self._text_of(row, f'line {number} of {path}')

    def _json_rows(self, path):
        for number, row in enumerate(json_values(path, self._chunks(path)), 1):
            if not isinstance(row, dict) or self.column in row:
                yield self._text_of(row, f'value {number} of {path}')
                continue
            tables = [x for x in row.values() if isinstance(x, list) and x and isinstance(x[0], dict)
                      and self.column in x[0]]
            if len(tables) == 1:  # {"version": 1, "data": [rows]}
                for inner, x in enumerate(tables[0], 1):
                    yield self._text_of(x, f'row {inner} of {path}')
            elif number == 1 and self.root.is_dir():  # the settings of some program, say
                self.no_rows += 1
                return
            else:
                check_column(self, row, f'value {number} of {path}')

    def _csv_rows(self, path):
        csv.field_size_limit(2**31 - 1)
        try:
            with unpacked(path, self.on_bytes) as raw, io.TextIOWrapper(raw, 'utf-8-sig', newline='') as file:
                header = file.readline()
                delimiter = max(',;\t', key=header.count)
                names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
                check_column(self, names, path)
                at = names.index(self.column)
                for number, row in enumerate(csv.reader(file, delimiter=delimiter, strict=True), 1):
                    if any(row[len(names):]):  # part of the text may be in another column
                        raise csv.Error(f'row {number} has {len(row)} fields, not {len(names)}: a text with '
                                        f'{delimiter!r} in it needs quotes')
                    if row:  # else a blank line
                        yield row[at] or None if at < len(row) else None
        except UnicodeDecodeError as error:
            raise ValueError(f'{path} is not UTF-8 ({error.reason}): convert it or leave it out') from None
        except csv.Error as error:
            raise ValueError(f'{path} is not CSV ({error}): mend it or leave it out') from None

    def _parquet_rows(self, path):
        parquet = need('pyarrow.parquet', f'input={path}')
        try:
            with parquet.ParquetFile(path) as file:
                check_column(self, file.schema_arrow.names, path)
                for batch in file.iter_batches(256, columns=[self.column]):
                    yield from batch.column(0).to_pylist()
        except OSError as error:
            raise ValueError(f'{path} is no parquet file ({one_line(error)}): fetch it again') from None
        except ValueError as error:  # pyarrow's, or that of check_column
            if type(error) is ValueError:
                raise
            raise ValueError(f'{path} is no parquet file ({one_line(error)}): fetch it again') from None
        self.on_bytes(path.stat().st_size)

    def _text_of(self, row, where):
        """The text of a JSON row: its column, or the row itself if it is a string."""
        if row is None or isinstance(row, str):
            return row
        check_column(self, row if isinstance(row, dict) else {}, where)
        return row[self.column]

    def files_in_words(self):
        """What is read and what is not, in one or two lines."""
        lines = [f'reading {count(sum(self.kinds.values()), "file")}: {in_words(self.kinds)}']
        if self.passed_over:
            lines.append(f'passed over: {in_words(self.passed_over)}')
        return '\n'.join(lines)

    def rows_in_words(self):
        """What the last iteration passed over or took for text, in up to three lines."""
        lines = [f'passed over: {count(self.nulls, "row")} without text'] if self.nulls else []
        if self.no_rows:
            lines.append(f'passed over: {self.no_rows:,} .json that hold no rows with a {self.column!r}')
        if self.markers:
            lines.append(f'{MARKER} stands {self.markers:,} times amid other text, and was read as text: it '
                         'ends a document only where it has a line of a text file to itself')
        return '\n'.join(lines)


def kind_of(path):
    """The ending of a file without its packing, and its packing: ('.txt', '.gz'), in lower case."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ''
    return (suffixes[-1] if suffixes else ''), packing


def packed_parquet(kind):
    return kind[0] == '.parquet' and kind[1] != ''


def kinds_in_words():
    return f'{" ".join(TEXTS + TABLES)}, also packed as {" ".join(PACKED)}'


def refuse(error):
    raise error


class Counted(io.RawIOBase):
    """A file that reports how many bytes were read from it."""

    def __init__(self, path, on_bytes):
        self.file, self.on_bytes = open(path, 'rb', buffering=0), on_bytes

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.file.readinto(buffer)
        self.on_bytes(n)
        return n

    def close(self):
        self.file.close()
        super().close()


class unpacked:
    """open(path, 'rb'), unpacked if the file's ending says that it is packed. Damage raises ValueError."""

    def __init__(self, path, on_bytes):
        self.path, self.packing = path, kind_of(path)[1]
        self.raw = io.BufferedReader(Counted(path, on_bytes), PIECE)
        opener = {'': lambda file: file, '.gz': lambda file: gzip.GzipFile(fileobj=file), '.bz2': bz2.BZ2File,
                  '.xz': lzma.LZMAFile, '.zst': open_zstandard}[self.packing]
        self.file = opener(self.raw)

    def __enter__(self):
        return self.file

    def __exit__(self, kind, error, traceback):
        self.raw.close()
        damage = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
        unnamed = isinstance(error, OSError) and error.errno is None or type(error).__name__ == 'ZstdError'
        if self.packing and (unnamed or isinstance(error, damage)):
            raise ValueError(f'{self.path} is damaged ({one_line(error)}): fetch it again') from None


def open_zstandard(file):
    """A reader of a .zst file, by Python itself (3.14), or by the package zstandard."""
    try:
        from compression import zstd
        return zstd.ZstdFile(file)
    except ImportError:
        return io.BufferedReader(Zstandard(file), PIECE)


class Zstandard(io.RawIOBase):
    """
    A .zst file, read by the package zstandard frame by frame: its own reader takes a file that was cut off
    for one that ends there.
    """

    def __init__(self, file):
        self.package, self.file = need('zstandard', 'a file that ends in .zst'), file
        self.packed, self.unpacked, self.frame = b'', b'', None

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.unpacked:
            self.packed = self.packed or self.file.read(PIECE // 8)
            if not self.packed:
                if self.frame:
                    raise EOFError('it ends amid a frame')
                return 0
            self.frame = self.frame or self.package.ZstdDecompressor().decompressobj()
            self.unpacked = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n


def json_values(path, chunks):
    """Yields the values in a JSON file: the items of an array, else all values that follow each other."""
    decoder, text, in_array, closed, wanted = json.JSONDecoder(), '', None, False, 0
    for chunk in chain(chunks, [None]):
        text, at = text + (chunk or ''), 0
        if chunk is not None and len(text) < wanted:
            continue
        while True:
            at = (BETWEEN_ITEMS if in_array else BLANKS).match(text, at).end()
            if at == len(text):
                break
            if closed:
                raise not_json(path)
            if in_array is None and text[at] == '[':
                in_array, at = True, at + 1
            elif in_array and text[at] == ']':
                closed, at = True, at + 1
            else:
                in_array = bool(in_array)
                try:
                    value, end = decoder.raw_decode(text, at)
                except RecursionError:
                    raise not_json(path) from None
                except ValueError:
                    if chunk is None:
                        raise not_json(path) from None
                    break
                if chunk is not None and end == len(text):
                    break  # the digits of a number may continue in the next chunk
                at = end
                yield value
        # an unfinished value is tried again when twice as much is there, so that the work stays linear
        text, wanted = text[at:], 2 * (len(text) - at)
    if in_array and not closed:
        raise not_json(path)


def in_pieces(chunks):
    """Text in chunks as pieces of at most about two PIECEs, cut where tokens are most likely to end."""
    text = ''
    for chunk in chunks:
        text, start = text + chunk, 0
        while len(text) - start > 2 * PIECE:
            end = good_cut(text, start + PIECE, start + 2 * PIECE)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def good_cut(text, low, high):
    """
    The last place from `low` to `high` at which the tokens of both sides are those of the undivided text:
    after a letter or digit and before white space, where the patterns of GPT-2, Llama 3 and other
    vocabularies divide. Else before white space, else `high`.
    """
    for before in AFTER_WORD, AFTER_ANY:
        found = before.match(text, low, high)
        if found:
            return found.end()
    return high


def check_column(corpus, columns, where):
    if corpus.column not in columns:
        raise ValueError(f'{where} has no column {corpus.column!r}: choose one of '
                         f'{", ".join(columns) or "none"} with --{corpus.flag}=')


def not_json(where):
    return ValueError(f'{where} is not JSON: mend it or leave it out')


def not_utf8(path, byte):
    return ValueError(f'{path} is not UTF-8 (byte {byte:,}): convert it or leave it out')


def count(n, noun):
    return f'{n:,} {noun}{"s" * (n != 1)}'


def in_words(counter):
    """A Counter as '12 .txt, 3 .html, 2 hidden files', the most frequent first."""
    return ', '.join(f'{n:,} {name}' if name[0] == '.' or name == 'plain text' else count(n, name)
                     for name, n in counter.most_common())


def shown(value):
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def one_line(error):
    return ' '.join(str(error).split()) or type(error).__name__
