"""Where what a config names is looked for: beside the config first, then in the working directory. Needs no torch."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

_folders: list[str] = []
"""Where configs lie, or say that their modules do: the last one first."""


class Given(str):
    """A Python object in the place of a name in a config; as a text, what files and messages call it."""

    value: Any

    def __new__(cls, text: str, value: Any) -> Self:
        """Stand for `value` under the name `text`."""
        made = super().__new__(cls, text)
        made.value = value
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: what it stands for may be a data set."""
        return self

    @classmethod
    def of(cls, value: Any) -> str:
        """The "package.module:name" of what can be imported, else a text between angle brackets with the object."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not (isinstance(module, str) and isinstance(name, str)):
            return cls(f"<{type(value).__module__}.{type(value).__qualname__} from Python>", value)
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        return f"{module}:{name}" if found is value and module != "__main__" else cls(f"<{module}.{name}>", value)


def look_in(*folders: str | Path) -> None:
    """Have modules looked for in these folders, in this order, then in the working directory if that is asked at all.

    New worker processes look there too. Python's own modules come before, as a `types.py` in a folder may not take the
    place of theirs; and what is installed comes after.
    """
    own = list(dict.fromkeys(str(Path(folder).resolve()) for folder in folders))
    here = [entry for entry in dict.fromkeys(sys.path) if entry in ("", str(Path.cwd())) and entry not in own]
    rest = [entry for entry in sys.path if entry not in (*own, *here)]
    behind = max((i for i, entry in enumerate(rest) if _is_of_python(entry)), default=-1) + 1
    sys.path[:] = [*rest[:behind], *own, *here, *rest[behind:]]
    _folders[:] = [*own, *(folder for folder in _folders if folder not in own)]
    importlib.invalidate_caches()


def _is_of_python(entry: str) -> bool:
    library = sysconfig.get_path("stdlib")
    return entry in (library, sysconfig.get_path("platstdlib"), str(Path(library, "lib-dynload")))


def remembered(at: Path, *folders: str | Path | None) -> list[list[str]]:
    """Folders as a file in `at` keeps them: each relative to it, for both to be moved, and absolute."""
    kept = dict.fromkeys(str(Path(folder).resolve()) for folder in folders if folder is not None)
    return [[os.path.relpath(folder, Path(at).absolute()), folder] for folder in kept]


def recalled(at: Path, places: Any) -> list[str]:
    """The folders that a file in `at` has kept, as far as there are any still."""
    pairs = [pair for pair in places if isinstance(pair, list)] if isinstance(places, list) else []
    found = (os.path.normpath(Path(at).absolute() / path) for pair in pairs for path in pair)
    return [path for path in dict.fromkeys(found) if Path(path).is_dir()]


def beside(name: str, folder: str | Path | None) -> str:
    """The path of a file or folder of that name in `folder`; the name itself where there is none."""
    if folder is None:
        return name
    path = Path(folder, os.path.expandvars(name)).expanduser()
    return str(path) if path.exists() else name


def another(module: str) -> tuple[str, str] | None:
    """The file of a module, or of a package that it is in, beside the config, where another one has been imported.

    Returns:
        Its file, and where the other one is from.
    """
    names = module.split(".")
    for i in range(1, len(names) + 1):
        loaded = sys.modules.get(".".join(names[:i]))
        if loaded is None:
            return None
        for folder in _folders[:1]:
            base = Path(folder, *names[:i])
            mine = next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.exists()), None)
            theirs = getattr(loaded, "__file__", None)
            if mine is not None and (theirs is None or mine.resolve() != Path(theirs).resolve()):
                return str(mine), theirs or "Python itself"
    return None


def told(module: str) -> str:
    """Where a module was looked for in vain, and which one there is called almost so; for messages."""
    here = str(Path.cwd())
    places = [f"beside the config ({folder})" for folder in _folders[:1] if folder != here]
    places += [f"in the working directory ({here})"] if here in (entry or here for entry in sys.path) else []
    names = _modules_in([*_folders[:1], here])
    near = difflib.get_close_matches(module, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"looked {', '.join([*places, 'among what is installed'])}{hint}"


def _modules_in(folders: Iterable[str]) -> set[str]:
    found = set()
    for folder in folders:
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        found |= {Path(entry.name).stem for entry in entries if entry.name.endswith(".py") or entry.is_dir()}
    return found
