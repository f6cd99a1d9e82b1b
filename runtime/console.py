"""
What the programs tell their user: one line on the terminal, from one process.

A user's mistake ends in fail(): what is wrong, with the values, and what to do next. So does what
the system refuses, such as a full disk. A bug keeps its traceback.
"""
import atexit
import contextlib
import errno
import io
import os
import select
import shlex
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository's folder
# what the system refuses, through no fault of the program
SYSTEM_ERRORS = {
    'EACCES', 'EPERM', 'EROFS', 'ENOSPC', 'EDQUOT', 'EFBIG', 'EIO', 'EMFILE', 'ENFILE', 'ENOTDIR',
    'EISDIR', 'ELOOP', 'ENOLINK', 'ENAMETOOLONG', 'ESTALE', 'EEXIST', 'EADDRINUSE'}
REMEDIES = {
    **dict.fromkeys(('ENOSPC', 'EDQUOT'), 'make room on that disk, or write to another one'),
    **dict.fromkeys(('EACCES', 'EPERM', 'EROFS'), 'change the permissions, or use another folder')}
_explainers = []  # see explain_errors()
_exit = sys.exit  # see exit_by()
_last_act = _argv = None  # see act_before_errors()


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


def report_error(what, remedy='', any_rank=False):
    """Prints an error on stderr: what went wrong, and what to do next.

    With any_rank=False only rank 0 prints it.
    """
    rank = os.environ.get('RANK', '0')
    if any_rank and rank != '0':
        what = f'rank {rank}: {what}'
    text = f'error: {what}; {remedy}' if remedy else f'error: {what}'
    if any_rank or rank == '0':
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


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
    report_error(what, remedy, who == 'rank' or who == 'node' and local_rank == '0')
    run_last_act(traceback.walk_stack(sys._getframe()))
    if rank != '0':
        time.sleep(10)  # torchrun ends all ranks when one exits: rank 0 must report first
    _exit(1)


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


def format_script(name, *words):
    """The command that runs a script of this repository, to paste into a shell."""
    return shlex.join(['python', shorten_path(os.path.join(ROOT, name)), *words])


def format_command(argv=None, **flags):
    """This program's command with these flags in place of its own, to paste into a shell.

    argv: the words of another command in place of this program's.
    """
    words = [word for word in argv or sys.argv
             if word.removeprefix('--').partition('=')[0] not in flags]
    words += [f'--{name}={value}' for name, value in flags.items()]
    return shlex.join(['python', *words])


# -----------------------------------------------------------------------------
# errors that nothing catches
def explain_errors(explainer):
    """From here on an error ends with one line if explainer(e) returns its (what, remedy)."""
    _explainers.append(explainer)


def exit_by(function):
    """From here on an error ends the program by function(status), and not by sys.exit."""
    global _exit
    _exit = function


def act_before_errors(act):
    """From here on act(frames) is called before an error ends the program; None: nothing.

    frames are the frames of the code that raised it.
    """
    global _last_act, _argv
    _last_act, _argv = act, list(sys.argv)
    shell = sys.modules['IPython'].get_ipython() if 'IPython' in sys.modules else None
    if act and shell:  # it handles errors itself, without sys.excepthook
        shell.events.register('post_run_cell', act_after_error)


def run_last_act(steps):
    """Does what act_before_errors() asked for. steps are those of traceback.walk_tb()."""
    global _last_act
    act, _last_act = _last_act, None  # an error in it must not call it again
    argv = sys.argv
    try:
        if act:
            sys.argv = _argv  # a notebook has its own again
            act([frame for frame, _ in steps])
    except Exception as e:
        warn(f'nothing could be saved after the error ({get_first_line(e)})')
    finally:
        sys.argv = argv


def act_after_error(*_):
    """Does what is still to be done after the last error that Python or IPython has printed."""
    run_last_act(traceback.walk_tb(getattr(sys, 'last_traceback', None)))


def explain_system_error(e):
    """(what, remedy) if the system refused something; None for other errors."""
    if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):
        e = e.__context__  # torch's writer hides the system's error behind its own
    if isinstance(e, OSError) and errno.errorcode.get(e.errno) in SYSTEM_ERRORS:
        place = f'{shorten_path(e.filename)}: ' if isinstance(e.filename, str) else ''
        return place + e.strerror, REMEDIES.get(errno.errorcode[e.errno], '')
    if 'No space left on device' in str(e):  # from a library that isn't written in Python
        return 'No space left on device', REMEDIES['ENOSPC']


def prepare_terminal():
    """Prepares the three streams, and how an error that nothing catches ends the program.

    A character that the terminal doesn't have is printed as its code. Ctrl-C, and a reader that
    has gone, as in `| head`, end the program without a word.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
            if os.name == 'nt' and not stream.isatty():
                stream.reconfigure(encoding='utf-8')  # Windows would use an old code page
    atexit.register(finish_output)
    _explainers[:] = [explain_system_error]
    act_after_error()  # of a script that ran before, in a notebook
    exit_by(sys.exit)
    earlier_hook = sys.excepthook

    def hook(kind, e, trace):
        if issubclass(kind, BrokenPipeError) and is_broken(sys.stdout):
            silence(sys.stdout)
            run_last_act(traceback.walk_tb(trace))
            sys.exit(141)  # as the shell reports a program that SIGPIPE has ended
        explanations = [explain(e) for explain in _explainers]
        explanation = next(filter(None, explanations), None)
        if explanation:
            report_error(*explanation, any_rank=True)
        elif not issubclass(kind, KeyboardInterrupt):
            earlier_hook(kind, e, trace)
        run_last_act(traceback.walk_tb(trace))
        if _exit is not sys.exit:
            atexit.register(_exit, 1)  # not here: torch.distributed prints later what came here

    sys.excepthook = hook


def open_closed_streams():
    """Opens the null device in place of streams that the shell has closed, as `2>&-` does.

    Otherwise the next file gets the stream's number, and messages go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')


def is_broken(stream):
    """Whether nobody reads any more what is written to the stream."""
    if not hasattr(select, 'poll'):  # Windows
        return True
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def silence(stream):
    """Sends what is still written to the stream nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def finish_output():
    """Ends the program with one line if its last output can't be written. atexit runs it."""
    act_after_error()  # somebody's own exit() in the middle of a run
    try:
        sys.stdout.flush()
    except OSError as e:
        silence(sys.stdout)
        if e.errno != errno.EPIPE:
            report_error(f'the output cannot be written ({e.strerror})')
            os._exit(1)
