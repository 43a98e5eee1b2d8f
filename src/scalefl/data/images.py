"""Images as uint8 planes, and what normalises them.

Shapes: N images, C channels, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalefl.errors import DataError

_GRAY_MODES = ("1", "L", "LA")
_CHANNELS = (1, 3, 4)

Frame = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""H and W."""


def frame(decode: Any, value: Any, where: str, size: Size | None) -> Frame:
    """One encoded image as [H, W] if gray, else [H, W, 3].

    Raises:
        DataError: it is empty, broken, or has more than 8 bits.
    """
    if value is None:
        raise DataError(f"{where} is empty")
    try:
        picture = decode(value)
    except OSError as error:
        raise DataError(f"{where} cannot be decoded: {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"{where} has more than 8 bits a pixel (mode {picture.mode}): convert it to 8 bits, or write a make_data "
            "that gives int16 or float32 images (docs/data.md)"
        )
    return _resized(picture.convert("L" if picture.mode in _GRAY_MODES else "RGB"), size)


def stacked(frames: Iterable[Frame], split: str) -> Tensor:
    """Frames of one size as [N, C, H, W]; gray ones among others get three channels.

    Raises:
        DataError: they differ in size.
    """
    found: list[Frame] = []
    for row, image in enumerate(frames):
        found.append(image)
        (height, width), (first_height, first_width) = image.shape[:2], found[0].shape[:2]
        if (height, width) != (first_height, first_width):
            raise DataError(
                f"image {row} of split {split!r} has {height}×{width} pixels, image 0 has {first_height}×{first_width}"
                f": set `resize`, as resize = {min(height, width, first_height, first_width)} or [height, width]"
            )
    if all(image.ndim == 2 for image in found):
        return torch.from_numpy(np.stack(found)).unsqueeze(1)
    colored = [image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2) for image in found]
    # Contiguous: channels-last rows would hand their memory format on to every activation.
    return torch.from_numpy(np.stack(colored)).permute(0, 3, 1, 2).contiguous()


def as_planes(images: Any, column: str, size: Size | None) -> Tensor:
    """An array [N, H, W], [N, H, W, C] or [N, C, H, W] as [N, C, H, W].

    Raises:
        DataError: where the channels are can't be told.
    """
    if images.ndim == 3:
        planes = torch.from_numpy(images).unsqueeze(1)
    elif images.shape[3] in _CHANNELS:
        planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    elif images.shape[1] in _CHANNELS:
        planes = torch.from_numpy(images)
    else:
        raise DataError(
            f"column {column!r} has images {list(images.shape[1:])}: expected 1, 3 or 4 channels, first or last"
        )
    if size is not None and tuple(planes.shape[2:]) != size:
        from PIL import Image

        flat = planes.flatten(0, 1).numpy()
        resized = np.stack([_resized(Image.fromarray(plane), size) for plane in flat])
        planes = torch.from_numpy(resized).reshape(*planes.shape[:2], *size)
    return planes.contiguous()


def pixel_statistics(columns: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel over all of `columns` [N, C, H, W], from 0 to 1, to 4 decimals.

    1 stands for no deviation.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for c in range(columns[0].shape[1]):
        # From a histogram: exact whatever the order of the rows, and without the images as floats.
        counts = sum(torch.bincount(images[:, c].flatten(), minlength=256) for images in columns)
        share = torch.as_tensor(counts).double() / torch.as_tensor(counts).sum()
        mean = float(share @ levels)
        std = float(share @ (levels - mean) ** 2) ** 0.5
        means.append(round(mean, 4))
        stds.append(round(std, 4) or 1.0)
    return tuple(means), tuple(stds)


def _resized(picture: Any, size: Size | None) -> Frame:
    if size is not None and picture.size != size[::-1]:
        from PIL import Image

        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture)
