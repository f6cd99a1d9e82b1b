"""
Requests from outside: signals that ask a run to stop or to save.

SIGTERM, SIGINT and SIGHUP ask it to stop, SIGUSR1 asks it to save. The loop calls
read_requests() once an iteration, so a signal never interrupts an update or a save.
"""
import os
import signal
import socket
import threading
import time

_stop_signal = 0  # the signal that asked this process to stop
_stop_time = None  # when the first of them came
_saves_requested = 0
_saves_reported = 0  # two counters and not a flag: a signal may come at any time
_earlier_handlers = {}
_pipe = None


def catch():
    """Turns the signals into requests from here on, until release().

    A signal to stop that comes 3 seconds or more after the first one ends the process at once;
    an earlier one changes nothing, as launchers send the same signal twice. A thread listens,
    because Python's own handlers wait while the main thread waits for a device or another rank.
    """
    global _pipe, _stop_signal, _stop_time, _saves_requested, _saves_reported
    _stop_signal, _stop_time = 0, None
    _saves_requested, _saves_reported = 0, 0
    if threading.current_thread() is not threading.main_thread():
        return  # Python leaves signals to the main thread, which is somebody else's program
    _pipe = socket.socketpair()
    _pipe[1].setblocking(False)
    signal.set_wakeup_fd(_pipe[1].fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(_pipe[0],), daemon=True).start()
    for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
        number = getattr(signal, name, None)  # Windows has only some of them
        if number is None:
            continue
        if name == 'SIGHUP' and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup asks to ignore a closed terminal
        _earlier_handlers[number] = signal.signal(number, lambda number, frame: None)


def _listen(pipe):
    global _stop_signal, _stop_time, _saves_requested
    while numbers := pipe.recv(64):  # one byte per signal; nothing once the other end is closed
        for number in numbers:
            if number == getattr(signal, 'SIGUSR1', None):
                _saves_requested += 1
            elif number in _earlier_handlers:
                if _stop_time and time.monotonic() - _stop_time > 3:
                    os._exit(128 + _stop_signal)
                _stop_signal = _stop_signal or number
                _stop_time = _stop_time or time.monotonic()


def read_requests():
    """(the signal to stop by or 0, whether to save since the last call) of this process."""
    global _saves_reported
    count = _saves_requested
    save = count > _saves_reported
    _saves_reported = count
    return _stop_signal, save


def release():
    """Returns the signals to those who handled them before catch()."""
    global _pipe
    for number in list(_earlier_handlers):
        signal.signal(number, _earlier_handlers.pop(number))
    if _pipe:
        signal.set_wakeup_fd(-1)
        _pipe[1].close()
        _pipe = None
