"""Import matplotlib whatever windows the environment wants it to use: pictures go into files.

A notebook's `MPLBACKEND` reaches the commands that are run from it; what it names may not be installed here, and then
matplotlib cannot be imported.
"""

from __future__ import annotations

import contextlib
import os

_wanted = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
finally:
    if _wanted is not None:
        os.environ["MPLBACKEND"] = _wanted
if _wanted is not None:
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _wanted
