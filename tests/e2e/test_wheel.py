"""The wheel works where it is installed, without the source tree."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
name = "wheel"
model = "cnn"
model_arguments = { width = 0.125 }
rounds = 2
clients_per_round = 2
data = { source = { name = "mnist5k" }, clients = 40 }
devices = { classes = "mixed" }
method = { name = "scalefl", blocks = 2 }
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A new environment that has the wheel, and borrows this one's other packages."""
    home = tmp_path_factory.mktemp("elsewhere")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(home), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv", with_pip=False)
    site = next((home / "venv").glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # A plain path, not this environment's own .pth files: those would bring the source tree back.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home


def run(home: Path, *command: str) -> str:
    done = subprocess.run(
        [str(home / "venv" / "bin" / "python"), "-P", *command], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_whole(elsewhere):
    where = run(elsewhere, "-c", "import scalefl; print(scalefl.__file__)")
    assert str(elsewhere) in where
    typed = "import scalefl, pathlib; print((pathlib.Path(scalefl.__file__).parent / 'py.typed').exists())"
    assert run(elsewhere, "-c", typed).strip() == "True"
    assert run(elsewhere, "-m", "scalefl.cli", "--version").startswith("scalefl 0.")


def test_the_wheel_trains(elsewhere):
    (elsewhere / "config.toml").write_text(CONFIG)
    out = run(elsewhere, "-m", "scalefl.cli", "run", "config.toml", "--set", "engine.workers=1")
    assert "test accuracy" in out
    assert all((elsewhere / "runs" / "wheel" / name).exists() for name in ("summary.json", "report.html"))
