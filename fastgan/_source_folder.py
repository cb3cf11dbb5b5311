"""Makes `python -m fastgan` and the like, run in the folder of the sources, use the installed package.

There Python finds the source folder before the installed package that hides behind it, but the compiled extension is
only in the latter, unless it was built in place.
"""

import importlib.util
import sys
from pathlib import Path


def installed_package_takes_over():
    """Loads the installed fastgan in place of an unbuilt source folder; False where this is not one, or there is no
    other."""
    here = Path(__file__).resolve().parent
    if (here / "_build_config.py").is_file():
        return False
    for entry in sys.path:
        package = Path(entry or ".").resolve() / "fastgan"
        if package != here and (package / "_build_config.py").is_file():
            break
    else:
        return False
    spec = importlib.util.spec_from_file_location(
        "fastgan", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules["fastgan"] = importlib.util.module_from_spec(spec)
    del sys.modules["fastgan._source_folder"]
    spec.loader.exec_module(sys.modules["fastgan"])
    return True
