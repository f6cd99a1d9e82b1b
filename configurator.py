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

# runtime/ may be next to this file and not next to the script; without a path, '', it is looked
# for in the current folder
_sys.path.append(_os.path.dirname(_sys._getframe().f_code.co_filename))
try:
    from runtime.settings import configure as _configure
except ModuleNotFoundError as _error:
    if not _error.name.startswith('runtime'):
        raise
    raise SystemExit('error: configurator.py needs the folder runtime/ next to your script; '
                     'copy that folder, too')
finally:
    _sys.path.pop()
_configure(globals())
del _configure, _os, _sys
