"""The model of a run as a plain file of tensors, under the names of the user's own `nn.Module`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from scalefl.checkpoint import load_deployed, write_whole
from scalefl.errors import CheckpointError, ConfigError
from scalefl.lookup import look_in
from scalefl.models import resolve
from scalefl.models.skeleton import aliases
from scalefl.models.spec import Factory, ModelSpec
from scalefl.params import Params
from scalefl.run_folder import RunFolder


def _safetensors(content: Mapping[str, Tensor]) -> bytes:
    # "format": what Hugging Face's loaders look for.
    return safetensors.torch.save(dict(content), {"format": "pt"})


def _pickled(content: Mapping[str, Tensor]) -> bytes:
    """A state dict of tensors alone, as `torch.load` reads it with `weights_only`, its default."""
    written = io.BytesIO()
    torch.save(dict(content), written)
    return written.getvalue()


FORMATS: Mapping[str, Callable[[Mapping[str, Tensor]], bytes]] = {
    ".safetensors": _safetensors,
    ".pt": _pickled,
    ".pth": _pickled,
}
"""By the ending of a file: what is written into it."""


def export(
    folder: str | Path, target: str | Path, model: str | Factory | nn.Module | ModelSpec | None = None
) -> tuple[ModelSpec, int]:
    """Write the model of a run's last saved state, so that `load_state_dict` takes what the file holds.

    The folder and the model's factory suffice: neither data nor method are asked for.

    Args:
        folder: the run's.
        target: the file to write: .safetensors (for `safetensors.torch.load_file`), or .pt or .pth (for `torch.load`).
        model: the factory or module, where the run was given a Python object that its folder can't name.

    Returns:
        How to build the module, and how many tensors were written.

    Raises:
        ConfigError: the file's ending names no format.
        CheckpointError: the run cannot be read, or the file cannot be written.
    """
    folder, target = Path(folder), Path(target)
    write = FORMATS.get(target.suffix.lower())
    if write is None:
        raise ConfigError(f"cannot write {target}: name a file that ends in {', '.join(FORMATS)}")
    files = RunFolder(folder)
    files.read_settings()  # is it a run, and one that this version reads?
    look_in(*files.places())
    given = None if model is None else ModelSpec.of(resolve(model) if isinstance(model, str) else model)
    spec, params = load_deployed(files.state, given)
    content = state_dict(spec, params)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {target.parent}: {error.strerror}") from error
    write_whole(target, write(content))
    return spec, len(content)


def state_dict(model: ModelSpec, params: Params) -> dict[str, Tensor]:
    """Exactly the entries of the module's own state dict: tied tensors under each of their names, no others."""
    module = model.build(0)  # for real: a skeleton may have lost ties on its way to the meta device
    first = aliases(module)
    names = {name: first.get(name, name) for name in module.state_dict()}
    missing = [name for name, original in names.items() if original not in params]
    if missing:
        raise CheckpointError(f"{model.name}: the run has no tensor for {', '.join(missing)}")
    return {name: params[original].detach().clone() for name, original in names.items()}
