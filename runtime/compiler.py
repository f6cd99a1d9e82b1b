"""
torch.compile: it is announced, its time is shown, and a model that can't be compiled runs without.
"""
import inspect
import os
import threading
import time

import torch
from tqdm import tqdm

from runtime import attention
from runtime.console import get_first_line, note, warn

OPTIMIZER_METHODS = 'add_param_group', 'zero_grad', 'state_dict', 'load_state_dict'
LONG_SECONDS = 10  # compiling that takes longer shows its time


def check_cache_folder():
    """Leaves out the setting for torch's cache of compiled code if that can't be written.

    Otherwise torch would raise an error when it is imported, also if nothing is compiled.
    """
    path = os.environ.get('TORCHINDUCTOR_CACHE_DIR')
    try:
        if path and not os.access(path, os.W_OK):
            os.makedirs(path)
    except OSError as e:
        warn(f'TORCHINDUCTOR_CACHE_DIR={path} cannot be written to ({e.strerror}), so compiled '
             'code is kept elsewhere')
        del os.environ['TORCHINDUCTOR_CACHE_DIR']


def postpone_import():
    """Makes torch's optimizers work without its compiler, whose import takes most of a second.

    The first optimizer would import it, only to exclude these methods from compiling. They are
    excluded again as soon as something here is compiled.
    """
    for method in list_excluded_methods():
        vars(method).setdefault('__dynamo_disable', method)


def list_excluded_methods():
    """The methods of torch's optimizers that its compiler leaves out."""
    methods = [getattr(torch.optim.Optimizer, name) for name in OPTIMIZER_METHODS]
    return [method.__wrapped__ for method in methods if hasattr(method, '__wrapped__')]


def run_step(optimizer, cls):
    """cls.step(optimizer) without torch's wrappers of it, which import the compiler, too.

    They also switch gradients off and name the step for a profiler. Nobody else may have wrapped
    it: see has_original_step().
    """
    name = f'Optimizer.step#{cls.__name__}.step'
    with torch.no_grad(), torch.autograd.profiler.record_function(name):
        inspect.unwrap(cls.step)(optimizer)


check_cache_folder()  # now, as torch reads it soon
postpone_import()


def compile_copy(model):
    """torch.compile(model): a module with the same weights, which is compiled."""
    watch_compiler()
    try:
        compiled_model = torch.compile(model)
    except RuntimeError as e:  # not on this system
        warn_of_failure(e)
        return model
    compiled_model.forward = fall_back(compiled_model.forward, model)
    return compiled_model


def compile_in_place(module):
    """module.compile(): from here on the module itself is compiled."""
    watch_compiler()
    try:
        module.compile()
    except RuntimeError as e:
        warn_of_failure(e)
        return
    module._compiled_call_impl = fall_back(module._compiled_call_impl, module._call_impl)


def fall_back(compiled, plain):
    """A function that calls compiled(), but only plain() once torch could not compile that."""
    def call(*args, **options):
        if stopwatch.has_failed:
            return plain(*args, **options)
        count = stopwatch.count
        try:
            return compiled(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # torch has no class for all that may go wrong
            if stopwatch.count == count:  # it was already compiled
                raise
            failure = getattr(e, 'inner_exception', e)
        result = plain(*args, **options)  # a mistake in the model itself is raised again here
        warn_of_failure(failure)
        return result

    return call


def has_failed():
    """Whether a model runs without torch.compile because that failed."""
    return stopwatch.has_failed


def warn_of_failure(e):
    """Says once that the model isn't compiled, and why."""
    if not stopwatch.has_failed:
        warn(f'torch.compile failed ({type(e).__name__}: {get_first_line(e)}), so the model runs '
             'without it, more slowly')
    stopwatch.has_failed = True


# -----------------------------------------------------------------------------
# the time that it takes
class Stopwatch:
    """Shows on a terminal for how long torch has been compiling."""

    def __init__(self):
        self.has_failed = False
        self.count = 0
        self.start = self.thread = None
        self.has_ended = threading.Event()

    def begin(self, *_):
        """torch calls this before it compiles."""
        if self.count == 0:
            note('compiling the model, which takes about a minute')
        self.count += 1
        self.start = time.perf_counter()
        self.has_ended.clear()
        self.thread = threading.Thread(target=self.show, daemon=True)
        self.thread.start()

    def show(self):
        """Shows the seconds once they are many, until the compiling ends."""
        if self.has_ended.wait(LONG_SECONDS):
            return
        disable = None if os.environ.get('RANK', '0') == '0' else True  # None: only on terminals
        with tqdm(bar_format='{desc}', leave=False, disable=disable) as bar:
            while not self.has_ended.wait(1):
                bar.set_description_str(f'compiling: {time.perf_counter() - self.start:.0f} s')

    def end(self, *_):
        """torch calls this after it has compiled, or has failed to."""
        self.has_ended.set()
        self.thread.join()
        seconds = time.perf_counter() - self.start
        if seconds > LONG_SECONDS:
            note(f'compiling took {seconds:.0f} s')


stopwatch = Stopwatch()


def watch_compiler():
    """Makes torch tell the stopwatch when it compiles, and compile the backward pass at once.

    Otherwise it would compile that in loss.backward(), where nothing can fall back.
    """
    from torch._dynamo import callback  # here: its import takes most of a second
    if stopwatch.begin not in callback.callback_handler.start_callbacks:
        callback.on_compile_start(stopwatch.begin)
        callback.on_compile_end(stopwatch.end)
        for method in list_excluded_methods():
            if vars(method).get('__dynamo_disable') is method:
                del method.__dynamo_disable
        attention.draw_words = torch.compiler.disable(attention.draw_words)  # numpy draws them
    torch._functorch.config.force_non_lazy_backward_lowering = True
