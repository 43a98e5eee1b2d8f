"""The model of a run as a plain safetensors file, under the names of the user's own `nn.Module`."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor

from scalefl.checkpoint import load_deployed, write_whole
from scalefl.errors import CheckpointError
from scalefl.models.skeleton import aliases
from scalefl.models.spec import ModelSpec
from scalefl.params import Params
from scalefl.run_folder import RunFolder


def export(folder: Path, target: Path) -> tuple[ModelSpec, int]:
    """Write the model of a run's last saved state, so that `load_state_dict(load_file(target))` takes it.

    The folder and the model's factory suffice: neither data nor method are asked for.

    Args:
        folder: the run's.
        target: the file to write.

    Returns:
        How to build the module, and how many tensors were written.

    Raises:
        CheckpointError: the run cannot be read, or the file cannot be written.
    """
    files = RunFolder(folder)
    files.read_settings()  # is it a run, and one that this version reads?
    model, params = load_deployed(files.state)
    content = state_dict(model, params)
    # "format": what Hugging Face's loaders look for.
    write_whole(target, safetensors.torch.save(content, {"format": "pt"}))
    return model, len(content)


def state_dict(model: ModelSpec, params: Params) -> dict[str, Tensor]:
    """Exactly the entries of the module's own state dict: tied tensors under each of their names, no others."""
    module = model.build(0)  # for real: a skeleton may have lost ties on its way to the meta device
    first = aliases(module)
    names = {name: first.get(name, name) for name in module.state_dict()}
    missing = [name for name, original in names.items() if original not in params]
    if missing:
        raise CheckpointError(f"{model.name}: the run has no tensor for {', '.join(missing)}")
    return {name: params[original].detach().clone() for name, original in names.items()}
