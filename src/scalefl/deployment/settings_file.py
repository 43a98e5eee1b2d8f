"""A settings file as it is written: read without what takes seconds to import."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from scalefl.errors import ConfigError

NODE_FILE, NODE_MAKER = "node.toml", "scalefl deploy init, in the folder nodes/"
NODE_AUTHORITY = "ca.pem"


def read_toml(path: Path, maker: str) -> dict[str, Any]:
    """The keys and values of a settings file.

    Raises:
        ConfigError: it is not there (`maker` is what makes it), or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no {path.name} in {path.parent}: it is made by {maker}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
