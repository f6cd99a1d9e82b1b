"""
The prompt of sample.py, and the texts that it makes from tokens, until a stop text.
"""
import ast
import codecs

from runtime.console import fail, note
from runtime.files import read_text
from runtime.tokenizer import CharTokenizer


def read_prompt(start):
    """The prompt in the setting start: its text, or that of the file in FILE:prompt.txt."""
    if start.startswith('FILE:'):
        return read_text(start.removeprefix('FILE:'), 'name a file with --start=FILE:prompt.txt')
    if not start:
        fail('the prompt must not be empty', 'without --start it is a new line')
    return start


def fit_prompt(start, tokenizer, block_size):
    """(prompt, its number of tokens). A line says if the model can't see all of it.

    The default prompt is a new line. If a table of characters has none, its first one is taken.
    """
    if start == '\n' and isinstance(tokenizer, CharTokenizer) and start not in tokenizer.stoi:
        start = min(tokenizer.stoi)
        note(f'the vocabulary has no new line, so the prompt is {start!r}')
    prompt_length = len(tokenizer.encode(start))
    if prompt_length > block_size:
        note(f'the prompt has {prompt_length} tokens; the model sees only the last {block_size}')
    return start, prompt_length


def open_decoder(tokenizer):
    """A function that returns the text that one more token adds. A token may end in a character."""
    if getattr(tokenizer, 'is_byte_level', True):
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda token: decoder.decode(tokenizer.decode_bytes([token]))
    from tokenizers.decoders import DecodeStream
    stream = DecodeStream(skip_special_tokens=False)
    return lambda token: stream.step(tokenizer.tokenizer, token) or ''


class TextStream:
    """A sample's text, made from its tokens one by one, until it ends before a stop text."""

    def __init__(self, tokenizer, stops):
        self.stops = stops
        self.text = ''
        self.is_complete = False
        self.num_taken = 0  # characters that take() has returned
        self.max_stop_length = max((len(stop) for stop in stops), default=1)
        self.decode = open_decoder(tokenizer)

    def add(self, token):
        """Adds a token's text, and cuts it off at the first stop text."""
        if self.is_complete:
            return
        search_from = max(0, len(self.text) - self.max_stop_length)
        self.text += self.decode(token)
        places = [self.text.find(stop, search_from) for stop in self.stops]
        places = [place for place in places if place >= 0]
        if places:
            self.text, self.is_complete = self.text[:min(places)], True

    def take(self, all=False):
        """The text since the last call, without what may be the beginning of a stop text."""
        end = len(self.text)
        if not self.is_complete and not all:
            end = max(self.num_taken, end - self.max_stop_length + 1)
        new_text = self.text[self.num_taken:end]
        self.num_taken = end
        return new_text


def parse_stops(stop):
    """The texts in the setting stop: one text, or a list of texts in Python's notation."""
    try:
        stops = ast.literal_eval(stop) if stop.startswith('[') else [stop]
    except (SyntaxError, ValueError):
        stops = [stop]  # a text that begins with a bracket
    if not all(isinstance(text, str) for text in stops):
        fail(f'stop={stop!r} is not a list of texts', """use --stop="['one', 'two']" for several""")
    return [text for text in stops if text]
