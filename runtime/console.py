"""
What the programs tell their user: one line on the terminal, from one process.

A user's mistake ends in fail(): what is wrong, with the values, and what to do next. A bug keeps
its traceback.
"""
import contextlib
import io
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository's folder


def say(text, error=False):
    """Prints one line on stdout, or on stderr, from rank 0."""
    if os.environ.get('RANK', '0') != '0':
        return
    stream = sys.stderr if error else sys.stdout
    with contextlib.suppress(OSError):  # a closed terminal or a full disk must not end a run
        print(text, file=stream, flush=True)


def note(text):
    """Prints one line on stderr, from rank 0."""
    say(text, error=True)


def warn(text):
    """Prints a warning on stderr, from rank 0. The program continues."""
    say(f'warning: {text}', error=True)


def report_error(what, remedy=''):
    """Prints an error on stderr, from rank 0: what went wrong, and what to do next."""
    text = f'error: {what}'
    if remedy:
        text += f'; {remedy}'
    say(text, error=True)


def try_or_warn(what, call, *args):
    """Returns the call's result. If it raises, prints a warning and returns None.

    For wandb and the picture: a failure there is not a reason to stop training.
    """
    try:
        return call(*args)
    except Exception as e:
        warn(f'{what}: {type(e).__name__}: {e}')


def fail(what, remedy='', who='rank 0'):
    """Ends the program with one line on stderr and exit status 1. It is for the user's mistakes.

    Under torchrun every rank finds the same mistake, so rank 0 reports it. With who='node' the
    first rank of each machine reports it, and with who='rank' every rank does: use them for
    mistakes that only one machine or one rank can find.
    """
    rank = os.environ.get('RANK', '0')
    local_rank = os.environ.get('LOCAL_RANK', '0')
    if rank != '0' and (who == 'rank' or who == 'node' and local_rank == '0'):
        print(f'error: rank {rank}: {what}; {remedy}', file=sys.stderr, flush=True)
    elif rank != '0':
        time.sleep(10)  # torchrun ends all ranks when one exits: rank 0 must report first
    report_error(what, remedy)
    sys.exit(1)


def get_first_line(e):
    """The first line of an exception's text, cut to 200 characters; else its type's name."""
    text = str(e).strip() or type(e).__name__
    return shorten(text.splitlines()[0], 200)


def shorten(text, length):
    """The text, with ' ...' in place of what is beyond this length."""
    return text if len(text) <= length else text[:length] + ' ...'


def shorten_path(path):
    """The path relative to the current folder, if that is shorter."""
    try:
        return min(os.path.relpath(path), os.path.abspath(path), key=len)
    except ValueError:  # on another drive
        return path


def format_bytes(n):
    """A number of bytes as text: MiB below one GiB, else GiB."""
    if n < 2 ** 30:
        return f'{n / 2 ** 20:.1f} MiB'
    return f'{n / 2 ** 30:.2f} GiB'


def make_folder(path, setting='--out_dir'):
    """Makes the folder if it isn't there; fails if that is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        fail(f'folder {path!r} cannot be created ({e.strerror})', f'name another with {setting}')


def prepare_terminal():
    """Makes Ctrl-C end the program without a traceback, and makes all text printable.

    A character that the terminal doesn't have is printed as its code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
            if os.name == 'nt' and not stream.isatty():
                stream.reconfigure(encoding='utf-8')  # Windows would use an old code page
    earlier_hook = sys.excepthook

    def hook(kind, e, trace):
        if not issubclass(kind, KeyboardInterrupt):
            earlier_hook(kind, e, trace)

    sys.excepthook = hook
