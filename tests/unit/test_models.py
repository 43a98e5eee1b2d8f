from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scalefl.errors import ConfigError
from scalefl.models import BUILT_IN, resolve
from scalefl.models.norms import make_norm
from scalefl.models.spec import ModelSpec
from scalefl.models.vit import Attention

CONVOLUTIONAL = [name for name in BUILT_IN if name != "vit"]
VARIANTS = [(name, {"norm": norm}) for name in CONVOLUTIONAL for norm in ("batch", "group", "none")] + [
    ("vit", {"norm": norm}) for norm in ("layer", "batch", "group")
]
WITH_STEM = ["resnet10", "resnet18", "resnet34", "squeezenet"]


def spec_of(name: str, **arguments: Any) -> ModelSpec:
    return ModelSpec.of(resolve(name), **arguments)


def images(num_images: int, size: int = 32) -> torch.Tensor:
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(0))


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("width", [1.0, 0.25])
@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_forward_and_skeleton(name: str, arguments: dict[str, Any], width: float) -> None:
    spec = spec_of(name, num_classes=7, width=width, **arguments)
    model, skeleton = spec.build(0), spec.skeleton()
    assert model(images(2)).shape == (2, 7)
    assert shapes(model) == shapes(skeleton)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert skeleton(images(2).to("meta")).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        # As torchvision has them, and kuangliu/pytorch-cifar for the CIFAR stem.
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"num_classes": 1000, "stem": "imagenet"}, 11_689_512),
        ("resnet34", {"num_classes": 1000, "stem": "imagenet"}, 21_797_672),
        ("squeezenet", {"num_classes": 1000, "stem": "imagenet", "norm": "none"}, 1_235_496),
        # kuangliu's VGG11 has 9 231 114, of them 2752 biases of convolutions that a norm makes idle.
        ("vgg11_bn", {}, 9_231_114 - 2752),
        # As the paper says.
        ("cnn", {"in_channels": 1, "image_size": 28}, 1_663_370),
        # DeiT-Ti of timm has 5 717 416, of them a class token and its position.
        ("vit", {"num_classes": 1000, "image_size": 224, "patch_size": 16}, 5_717_416 - 2 * 192),
    ],
)
def test_number_of_parameters(name: str, arguments: dict[str, Any], count: int) -> None:
    assert num_parameters(spec_of(name, **arguments).skeleton()) == count


@pytest.mark.parametrize("name", BUILT_IN)
def test_width_scales_every_hidden_channel(name: str) -> None:
    whole, half = spec_of(name).skeleton(), spec_of(name).at_width(0.5).skeleton()
    wide, narrow = shapes(whole), shapes(half)
    assert wide.keys() == narrow.keys()
    assert all(n in (w, w // 2) for key in wide for w, n in zip(wide[key], narrow[key], strict=True))
    assert 0.24 < num_parameters(half) / num_parameters(whole) < 0.27


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_width_is_too_small(name: str) -> None:
    assert spec_of(name, width=0.001).build(0).eval()(images(2)).shape == (2, 10)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_leading_channels_are_a_narrower_model(name: str, norm: str) -> None:
    """A wide model with a narrow one in its leading channels, and zeros beside it, computes the same."""
    narrow = spec_of(name, norm=norm, width=0.25).build(0).eval()
    wide = spec_of(name, norm=norm, width=0.5).build(1).eval()
    state = wide.state_dict()
    for key, tensor in narrow.state_dict().items():
        if key.endswith(("weight", "bias")):
            state[key].zero_()[tuple(map(slice, tensor.shape))] = tensor
    torch.testing.assert_close(wide(images(2)), narrow(images(2)))


def test_leading_channels_are_a_narrower_attention() -> None:
    narrow, wide = Attention(12, heads=3), Attention(24, heads=3)
    state = wide.state_dict()
    for key, tensor in narrow.state_dict().items():
        state[key].zero_()[tuple(map(slice, tensor.shape))] = tensor
    for name in ("query.weight", "query.bias"):
        state[name].mul_(math.sqrt(2))  # undoes the division by the root of the wider head
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(wide(F.pad(x, (0, 12)))[..., :12], narrow(x))


@pytest.mark.parametrize("name", [*WITH_STEM, "vgg11_bn"])
def test_large_images(name: str) -> None:
    stem = {"stem": "imagenet"} if name in WITH_STEM else {}
    model = spec_of(name, num_classes=100, width=0.25, **stem).build(0).eval()
    assert model(images(1, 224)).shape == (1, 100)


def test_grey_images() -> None:
    model = spec_of("cnn", in_channels=1, image_size=28).build(0)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_a_step_changes_every_parameter(name: str, arguments: dict[str, Any]) -> None:
    model = spec_of(name, width=0.25, **arguments).build(0)
    before = copy.deepcopy(dict(model.named_parameters()))
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert [key for key, p in model.named_parameters() if torch.equal(p, before[key])] == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, again, other = (spec_of(name, width=0.25).build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in first if first[key].ndim > 1)


@pytest.mark.parametrize("name", WITH_STEM[:3])
def test_residual_blocks_are_units(name: str) -> None:
    """Each block is called once, in order, and no other module ends in its output tensor."""
    model = spec_of(name, width=0.25).build(0)
    ends: dict[int, list[str]] = {}
    outputs = []  # kept, so that no id is given twice

    def note(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            outputs.append(output)
            ends.setdefault(id(output), []).append(path)

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(note(path))
    model(images(2))
    blocks = [paths for paths in ends.values() if any(p.startswith("layer") and p.count(".") == 1 for p in paths)]
    counts = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}[name]
    assert blocks == [[f"layer{s}.{i}"] for s, count in enumerate(counts, 1) for i in range(count)]


@pytest.mark.parametrize(
    ("num_channels", "num_groups"),
    [(1, 1), (3, 1), (7, 1), (12, 3), (16, 4), (64, 16), (128, 32), (512, 32), (200, 25)],
)
def test_groups_divide_the_channels(num_channels: int, num_groups: int) -> None:
    norm = make_norm("group", num_channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == num_groups


def test_resolve() -> None:
    assert resolve("resnet18") == "scalefl.models.resnet:resnet18"
    assert resolve("my.package:factory") == "my.package:factory"
    with pytest.raises(ConfigError, match=r"'resnet81'.*'resnet18'.*package\.module:factory"):
        resolve("resnet81")


@pytest.mark.parametrize("arguments", [{"norm": "batchnorm"}, {"stem": "cifar10"}])
@pytest.mark.parametrize("name", WITH_STEM)
def test_unknown_options(name: str, arguments: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is not one of"):
        spec_of(name, **arguments).build(0)


@pytest.mark.parametrize("arguments", [{"image_size": 30}, {"dim": 100}])
def test_vit_refuses_what_does_not_divide(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        spec_of("vit", **arguments).build(0)
