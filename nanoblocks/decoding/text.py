"""Tokens to text as they arrive, the strings and special tokens that end a text, and prompts from files."""
import codecs
import json
import os

from nanoblocks.tokenizer import read_text


class Text:
    """
    The text of one row as it grows. Characters appear once their last byte has arrived, and nothing appears
    of a stop string or of an ending token.
    """

    def __init__(self, tokenizer, stop_strings=(), stop_tokens=(), before=()):
        """before: the tokens of the prompt, on which a blank at the beginning may depend"""
        # one character may span several tokens: the incremental decoder holds back its first bytes
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.tokenizer, self.stop_strings, self.stop_tokens = tokenizer, stop_strings, stop_tokens
        self.tokens, self.text, self.done, self.before = [], '', False, list(before)
        self.returned = 0       # characters that `add` has returned

    def add(self, token):
        """Add one token -> the characters that are certain now and were not returned before."""
        if self.done:
            return ''
        before = self.tokens[-8:] or self.before[-8:]
        self.tokens.append(token)
        if token in self.stop_tokens:
            return self.finish()
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token], before))
        found = [at for at in (self.text.find(stop) for stop in self.stop_strings) if at >= 0]
        if found:
            self.text, self.done = self.text[:min(found)], True
            return self.fresh(len(self.text))
        return self.fresh(len(self.text) - self.possible_stop())

    def finish(self):
        """End the text -> the characters that were held back."""
        if not self.done:
            self.text, self.done = self.text + self.decoder.decode(b'', final=True), True
        return self.fresh(len(self.text))

    def possible_stop(self):
        """Number of characters at the end of the text that may be the beginning of a stop string."""
        return max((n for stop in self.stop_strings for n in range(1, len(stop))
                    if self.text.endswith(stop[:n])), default=0)

    def fresh(self, end):
        """The characters before `end` that were not returned before."""
        fresh, self.returned = self.text[self.returned:end], max(self.returned, end)
        return fresh


def stops_of(stop, tokenizer):
    """
    stop: a text or special token, or several as a list or as a JSON list
    -> (stop strings, stop tokens); the tokens that end a text are always stop tokens
    """
    if isinstance(stop, str):
        try:
            stop = json.loads(stop) if stop.startswith('[') else [stop]
        except ValueError:
            raise ValueError(f'stop={stop} must be a text, or a JSON list such as ["\\n", "END"]') from None
    tokens = {text: special_token(tokenizer, text) for text in map(str, stop)}
    strings = [text for text, token in tokens.items() if text and token is None]
    return strings, [*tokenizer.ends, *(token for token in tokens.values() if token is not None)]


def special_token(tokenizer, text):
    """The id of the special token written `text`; None for ordinary text."""
    published = getattr(tokenizer, 'tokenizer', None)       # of a checkpoint in Hugging Face format
    found = published.token_to_id(text) if published is not None and text.startswith('<') else None
    if found is None and text == '<|endoftext|>' and tokenizer.eot is not None:
        return tokenizer.eot
    if found is None and text.startswith('<|') and text.endswith('|>'):
        raise ValueError(f'stop={text} must be a text or a special token of this tokenizer')
    return found


def text_or_file(value):
    """The text itself, or with FILE: in front the content of that file."""
    return read_text(value.removeprefix('FILE:')) if value.startswith('FILE:') else value


def refuse_to_overwrite(out, *sources):
    """ValueError if the file to write is one of the files that are read, given as a path or as FILE:path."""
    for source in sources:
        path = source.removeprefix('FILE:')
        if out and os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise ValueError(f'out={out} must not be a file that is read, or that is lost: name another')


def read_prompts(path):
    """The prompts of a file: one per line, or in a .jsonl file the "prompt" of every line."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f'prompts={path} must hold at least one line that is not empty')
    try:
        return [str(json.loads(line)['prompt']) for line in lines] if path.endswith('.jsonl') else lines
    except (ValueError, TypeError, KeyError):
        raise ValueError(f'prompts={path} must hold JSON lines with a "prompt" each') from None
