"""Photographs as inputs: resized, centre-cropped, normalised as ImageNet's models expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from executor.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["image_input"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_input(image: Image, shape: tuple[int, ...] = (1, 3, 224, 224)) -> torch.Tensor:
    """An image as a float32 input.

    Args:
        image: Any mode; it is converted to RGB.
        shape: The model's input, 1 x 3 x S x S: the shorter side is resized to S * 8 / 7 (256 for
            224), the crop is S.

    Raises:
        ConfigError: The model takes no colour image.
    """
    from PIL.Image import Resampling

    crop, resized = shape[-1], round(shape[-1] * 8 / 7)
    if shape != (1, 3, crop, crop):
        raise ConfigError(f"images are 1 x 3 x S x S, the model takes {shape}")
    rgb = image.convert("RGB")
    scale = resized / min(rgb.size)
    size = (max(resized, round(rgb.width * scale)), max(resized, round(rgb.height * scale)))
    rgb = rgb.resize(size, Resampling.BILINEAR)
    left, top = (rgb.width - crop) // 2, (rgb.height - crop) // 2
    pixels = np.asarray(rgb.crop((left, top, left + crop, top + crop)), dtype=np.float32)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255.0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return ((tensor - mean) / std).unsqueeze(0).contiguous()
