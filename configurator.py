# Sets a script's settings from config files and from the command line. Every script runs it:
#
#     exec(open('configurator.py').read())
#
# A setting is a global that the script assigns above that line: a bool, int, float, str, list,
# tuple, dict or None. The comment after the assignment is its help.
#
#     python train.py config/train_shakespeare_char.py --batch_size=32 --eval_only
#     python train.py config/train_shakespeare_char.py --help
#
# Config files are Python. They run first, in the order on the command line, in the script's own
# globals. Flags come after them. The final values are in `config`, a dict, unless your script has
# its own `config`. All mistakes are reported together, before anything else happens.

import os as _os
import sys as _sys

# runtime/ is next to this file, whose path may not be known here: then it is looked for in the
# current folder, and in the two folders around it
_paths = [_os.path.dirname(_sys._getframe().f_code.co_filename), '..', '../..']
_sys.path += _paths
try:
    from runtime.settings import configure as _configure
except ModuleNotFoundError as _error:
    if not _error.name.startswith('runtime'):
        raise
    raise SystemExit('error: configurator.py needs the folder runtime/ next to your script; '
                     'copy that folder, too')
finally:
    del _sys.path[-len(_paths):]
_configure(globals())
del _configure, _os, _paths, _sys
