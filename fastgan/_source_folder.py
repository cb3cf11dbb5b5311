"""Makes `python -m fastgan` and the like, run in the folder of the sources, use the installed package.

There Python finds the source folder before the installed package that hides behind it, but the compiled extension is
only in the latter (unless built in place). Then every module is taken from the installed one.
"""

import sys
from pathlib import Path

import fastgan

_here = Path(__file__).resolve().parent

if not (_here / "_build_config.py").is_file():
    for _entry in sys.path:
        _installed = Path(_entry or ".").resolve() / "fastgan"
        if _installed != _here and (_installed / "_build_config.py").is_file():
            fastgan.__path__[:] = [str(_installed)]
            break
