"""
Parts of documents to token ids, in this process or in several. The ids are the same, and so is their order.
"""
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from .reading import in_pieces
from .tokenizer import from_meta, utf8

# what follows a part of a document: more of it, its end, or the text that was cut off
MORE, END, CUT = 'more', 'end', 'cut'

# what a process encodes at a time, in characters and in parts
BATCH, MOST_PARTS = 1 << 20, 4096


def encoded(text, tokenizer, within=False):
    """
    Yields (ids, number of bytes) of the pieces of a text: all its tokens at once would fill the memory.
    within: the text continues a document.
    """
    own = tokenizer.meta()['kind'] in ('bytes', 'chars', 'tiktoken', 'bpe')
    # a published tokenizer may put a blank before a text, but not amid one: encode behind a word
    word = [] if own else tokenizer.encode('a')
    for piece in in_pieces([text]):
        ids = tokenizer.encode(f'a{piece}') if within and not own else []
        ids = ids[len(word):] if ids and ids[:len(word)] == word else tokenizer.encode(piece)
        yield ids, len(utf8(piece))
        within = True


def encoded_parts(documents, tokenizer, within, processes=1):
    """
    Yields (split, what `encoded` gives, MORE or END or CUT, state) of the parts of documents. within: {split:
    whether its first part continues a document}. state() is that of the documents after this part, to resume
    from; of some parts it is None.
    """
    state = getattr(documents, 'state_dict', None)
    if processes > 1:
        yield from encoded_elsewhere(documents, tokenizer, within, processes, state)
        return
    for split, text, continues, end in with_ends(documents, within):
        yield split, encoded(text, tokenizer, continues), end, state


def with_ends(documents, within):
    """Yields (split, text, whether it continues a document, MORE or END or CUT) of each part."""
    within = dict(within)
    for split, text, *end in documents:
        end = end[0] if end else END
        yield split, text, within[split], end
        within[split] = end == MORE and (within[split] or text != '')


def encoded_elsewhere(documents, tokenizer, within, processes, state):
    """The same by so many processes; this one reads, and a few batches wait between the two."""
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'), begin, (tokenizer.meta(),))
    waiting = deque()
    try:
        for parts in batches(with_ends(documents, within)):
            work = pool.submit(encode, [(text, continues) for _, text, continues, _ in parts])
            # reading goes on, so what it has come to must be noted now
            waiting.append((parts, state and state(), work))
            if len(waiting) > 2 * processes:
                yield from finished(*waiting.popleft())
        while waiting:
            yield from finished(*waiting.popleft())
    except BrokenProcessPool:
        raise ValueError(f'processes={processes} must be lower, as one of them was killed, as by a system '
                         'that is short of memory: run the same command with fewer') from None
    finally:
        pool.shutdown(cancel_futures=True)


def batches(parts):
    """Lists of parts, each of about BATCH characters."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= BATCH or len(batch) == MOST_PARTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def finished(parts, state, work):
    for place, ((split, _, _, end), pieces) in enumerate(zip(parts, work.result()), 1):
        yield split, pieces, end, (lambda: state) if place == len(parts) else None


# ----------------------------------------------------------------------------------------------------------
# In the other processes

own = {}


def begin(meta):
    """Make the tokenizer. Ctrl-C is for the parent process, with which this one ends, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    own['tokenizer'] = from_meta(meta)


def encode(parts):
    """[[(ids, number of bytes) of each piece] of each part], of parts (text, whether it continues one)."""
    return [[(np.array(ids, np.uint32), size) for ids, size in encoded(text, own['tokenizer'], continues)]
            for text, continues in parts]
