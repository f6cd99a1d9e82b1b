# Sets a script's settings from config files and from the command line. Every script runs it:
#
#     exec(open('configurator.py').read())
#
# A setting is a bool, int, float or str global that the script assigns above that line. The
# comment after the assignment is its help.
#
#     python train.py config/train_shakespeare_char.py --batch_size=32 --eval_only
#     python train.py config/train_shakespeare_char.py --help
#
# Config files are Python. They run first, in the order on the command line, in the script's own
# globals. Flags come after them. The final values are in `config`, a dict. All mistakes are
# reported together, before anything else happens.

try:
    from runtime.settings import configure as _configure
except ModuleNotFoundError as _error:
    if not _error.name.startswith('runtime'):
        raise
    raise SystemExit('error: configurator.py needs the folder runtime/ next to your script; '
                     'copy that folder, too')
_configure(globals())
del _configure
