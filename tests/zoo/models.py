"""The zoo: small models of every common kind, as users write them or take them from `transformers` and timm.

Each function is a factory, `zoo.models:NAME`, whose one argument says what of the model is to be trained.
Shapes: B examples, C channels, H×W pixels, L tokens or steps, D features, K classes.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data import CATEGORIES, LENGTH, NUM_CLASSES, NUMBERS, VOCABULARY

Factory = Callable[..., nn.Module]

VARIANTS = ("as is", "half frozen", "adapters")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Args:
        about: what it is, for the page.
        data: the function in `zoo.data` that makes what it learns.
        arguments: for that function.
        adapted: names of the layers that get adapters; none: all plain linear and convolutional ones but the head.
        head: names of the modules that are trained beside them.
        settings: more for peft's `LoraConfig`.
    """

    about: str
    data: str
    arguments: tuple[tuple[str, Any], ...]
    adapted: tuple[str, ...]
    head: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]


ZOO: dict[str, Entry] = {}


def entry(
    about: str,
    data: str,
    adapted: str = "",
    head: str = "head",
    settings: tuple[tuple[str, Any], ...] = (),
    **arguments: Any,
) -> Callable[[Callable[[], nn.Module]], Factory]:
    """Put a model in the zoo, and give its factory the argument `variant`."""

    def added(make: Callable[[], nn.Module]) -> Factory:
        name = make.__name__
        ZOO[name] = Entry(about, data, tuple(arguments.items()), tuple(adapted.split()), tuple(head.split()), settings)

        def factory(variant: str = "as is") -> nn.Module:
            model = make()
            if variant == "half frozen":
                return half_frozen(model)
            return with_adapters(model, ZOO[name]) if variant == "adapters" else model

        factory.__name__ = factory.__qualname__ = name
        factory.__doc__ = about
        return factory

    return added


def half_frozen(model: nn.Module) -> nn.Module:
    """The model with the first half of its parameters frozen, as one fine-tunes."""
    parameters = list(model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    return model


def with_adapters(model: nn.Module, about: Entry) -> nn.Module:
    """The frozen model with peft's LoRA, and its head trained along."""
    from peft import LoraConfig, get_peft_model

    adapted = list(about.adapted) or [
        n for n, layer in model.named_modules() if n not in about.head and _takes_adapters(layer)
    ]
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=adapted, modules_to_save=list(about.head) or None, **dict(about.settings)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        return get_peft_model(model, config)


def _takes_adapters(layer: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return type(layer) in kinds and getattr(layer, "groups", 1) == 1  # others have parametrizations, or merge badly


# Convolutional nets for images


def _unit(c: int, d: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, d, 3, stride, 1, bias=False), norm(d), nn.ReLU(inplace=True))


class Pooled(nn.Module):
    """A body [B, C, …], its mean over places, and a linear head."""

    def __init__(self, body: nn.Module, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(x).flatten(2).mean(2)))


@entry("convolutions one after another, batch norm", "images")
def plain() -> nn.Module:
    return Pooled(nn.Sequential(_unit(3, 8), _unit(8, 12, 2), _unit(12, 12), _unit(12, 16)), 16)


class Basic(nn.Module):
    def __init__(self, c: int, d: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d)
        self.conv2, self.norm2 = nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if c == d else nn.Sequential(nn.Conv2d(c, d, 1, stride), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


@entry("residual net", "images")
def residual() -> nn.Module:
    return Pooled(nn.Sequential(_unit(3, 8), Basic(8, 8), Basic(8, 12, 2), Basic(12, 12)), 12, dropout=0.1)


class Preactivated(nn.Module):
    def __init__(self, c: int, d: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, c), nn.Conv2d(c, d, 3, stride, 1)
        self.norm2, self.conv2 = nn.GroupNorm(2, d), nn.Conv2d(d, d, 3, 1, 1)
        self.shortcut = nn.Conv2d(c, d, 1, stride, bias=False) if c != d or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(y)
        return around + self.conv2(F.relu(self.norm2(self.conv1(y))))


@entry("residual net, norms first; group norm", "images")
def preactivated() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Preactivated(8, 8), Preactivated(8, 12, 2))
    body.append(Preactivated(12, 12)).append(nn.GroupNorm(2, 12)).append(nn.ReLU())
    return Pooled(body, 12)


class Squeeze(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gate)


class Inverted(nn.Module):
    def __init__(self, c: int, d: int, stride: int = 1) -> None:
        super().__init__()
        wide = 2 * c
        self.expand, self.norm1 = nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.norm2, self.squeeze = nn.BatchNorm2d(wide), Squeeze(wide)
        self.project, self.norm3 = nn.Conv2d(wide, d, 1, bias=False), nn.BatchNorm2d(d)
        self.is_residual = stride == 1 and c == d

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm1(self.expand(x)))
        y = self.norm3(self.project(self.squeeze(F.hardswish(self.norm2(self.depthwise(y))))))
        return x + y if self.is_residual else y


@entry("depthwise convolutions with squeeze and excitation", "images")
def depthwise() -> nn.Module:
    return Pooled(nn.Sequential(_unit(3, 8), Inverted(8, 8), Inverted(8, 12, 2), Inverted(12, 12)), 12)


class DenseStage(nn.Module):
    def __init__(self, c: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c + i * growth), nn.ReLU(), nn.Conv2d(c + i * growth, growth, 3, padding=1))
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@entry("dense net with transitions", "images")
def dense() -> nn.Module:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stage1 = nn.Conv2d(3, 8, 3, padding=1), DenseStage(8, 4, 2)
            self.transition, self.stage2 = nn.Conv2d(16, 8, 1), DenseStage(8, 4, 2)
            self.head = nn.Linear(16, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = F.avg_pool2d(self.transition(F.relu(self.stage1(self.stem(x)))), 2)
            return self.head(self.stage2(x).mean((2, 3)))

    return Dense()


@entry("dense net of one stage: every layer reads the input", "images")
def all_to_all() -> nn.Module:
    return Pooled(DenseStage(3, 4, 4), 3 + 16)


class Branches(nn.Module):
    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(c, d // 2, 1), nn.Conv2d(c, d // 4, 3, padding=1)
        self.five, self.norm = nn.Conv2d(c, d // 4, 5, padding=2), nn.BatchNorm2d(d)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([self.one(x), self.three(x), self.five(x)], 1)))


@entry("branches side by side, joined (Inception)", "images")
def inception() -> nn.Module:
    return Pooled(nn.Sequential(_unit(3, 8), Branches(8, 12), nn.MaxPool2d(2), Branches(12, 16), Branches(16, 16)), 16)


class Shuffled(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.first, self.norm1 = nn.Conv2d(half, half, 1), nn.BatchNorm2d(half)
        self.depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.last, self.norm2 = nn.Conv2d(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        right = F.relu(self.norm2(self.last(self.depthwise(F.relu(self.norm1(self.first(right)))))))
        return torch.cat([left, right], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@entry("channels split and shuffled (ShuffleNet)", "images")
def shuffle() -> nn.Module:
    return Pooled(nn.Sequential(_unit(3, 12, 2), Shuffled(12), Shuffled(12), _unit(12, 16)), 16)


@entry("spectral norm, whose vectors change as it runs", "images")
def spectral() -> nn.Module:
    from torch.nn.utils.parametrizations import spectral_norm

    def layer(c: int, d: int, stride: int = 1) -> list[nn.Module]:
        return [spectral_norm(nn.Conv2d(c, d, 3, stride, 1)), nn.LeakyReLU(0.1)]

    body = [*layer(3, 8), *layer(8, 12, 2), nn.Conv2d(12, 12, 1), nn.ReLU(), *layer(12, 16)]
    return Pooled(nn.Sequential(*body), 16)


@entry("ConvNeXt, from transformers", "images", "pwconv1 pwconv2", "classifier", size=16)
def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(patch_size=2, hidden_sizes=[8, 8, 12, 12], depths=[1, 1, 1, 1], num_labels=NUM_CLASSES)
    )


# Attention and mixing for images


@entry("ViT, from transformers", "images", "q_proj v_proj", "classifier", size=16)
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=NUM_CLASSES,
            initializer_range=0.2,
        )
    )


@entry("Swin, from transformers: shifted windows", "images", "q_proj v_proj", "classifier", size=16)
def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
            num_labels=NUM_CLASSES,
            initializer_range=0.2,
        )
    )


class Mixing(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.within = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


@entry("MLP-mixer", "images")
def mixer() -> nn.Module:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 12, 2, stride=2)
            self.layers = nn.Sequential(*(Mixing(16, 12) for _ in range(3)))
            self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.layers(self.embed(x).flatten(2).mT)).mean(1))

    return Mixer()


@entry("patches through torch's own transformer encoder", "images", "linear1 linear2")
def encoder() -> nn.Module:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 4, stride=4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.places = nn.Parameter(0.1 * torch.randn(1, 5, 16))
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(16, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).mT
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
            return self.head(self.encoder(x)[:, 0])

    return Encoder()


# Signals and sequences


@entry("convolutions along one dimension", "signals")
def conv1d() -> nn.Module:
    def unit(c: int, d: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv1d(c, d, 3, stride, 1), nn.BatchNorm1d(d), nn.ReLU())

    return Pooled(nn.Sequential(unit(2, 8), unit(8, 12, 2), unit(12, 12), unit(12, 16)), 16)


class Causal(nn.Module):
    def __init__(self, c: int, dilation: int) -> None:
        super().__init__()
        from torch.nn.utils.parametrizations import weight_norm

        self.dilation = dilation
        self.conv, self.mix = weight_norm(nn.Conv1d(c, c, 3, dilation=dilation)), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.relu(self.conv(F.pad(x, (2 * self.dilation, 0)))))


@entry("causal dilated convolutions with weight norm (TCN)", "signals")
def tcn() -> nn.Module:
    return Pooled(nn.Sequential(nn.Conv1d(2, 8, 1), Causal(8, 1), Causal(8, 2), Causal(8, 4)), 8)


class Recurrent(nn.Module):
    """Layers of a recurrent net, each a module of its own, between an embedding and a head."""

    def __init__(self, kind: Any, embed: nn.Module, width: int = 8, **settings: Any) -> None:
        super().__init__()
        self.embed = embed
        out = width * (2 if settings.get("bidirectional") else 1)
        self.layers = nn.ModuleList([kind(width, width, batch_first=True, **settings)])
        self.layers.append(kind(out, width, batch_first=True, **settings))
        self.between, self.head = nn.Linear(out, out), nn.Linear(out, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(F.relu(self.between(x[:, -1])))


@entry("LSTM", "sequences")
def lstm() -> nn.Module:
    return Recurrent(nn.LSTM, nn.Linear(3, 8))


@entry("GRU in both directions", "sequences")
def gru() -> nn.Module:
    return Recurrent(nn.GRU, nn.Linear(3, 8), bidirectional=True)


# Volumes and tables


@entry("convolutions along three dimensions", "volumes")
def conv3d() -> nn.Module:
    def unit(c: int, d: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv3d(c, d, 3, stride, 1), nn.GroupNorm(2, d), nn.ReLU())

    return Pooled(nn.Sequential(unit(1, 8), unit(8, 12, 2), unit(12, 12)), 12)


@entry("MLP on a table", "table")
def mlp() -> nn.Module:
    layers = [("first", nn.Linear(NUMBERS, 16)), ("second", nn.Linear(16, 16)), ("third", nn.Linear(16, 12))]
    between = [(f"relu{i}", nn.ReLU()) for i in range(3)]
    named = [one for pair in zip(layers, between, strict=True) for one in pair]
    return nn.Sequential(OrderedDict([*named, ("head", nn.Linear(12, NUM_CLASSES))]))


class Widened(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.second(F.relu(self.first(self.norm(x)))), 0.1, self.training)


@entry("residual MLP on a table, batch norm and dropout", "table")
def residual_mlp() -> nn.Module:
    class ResidualMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(NUMBERS, 12)
            self.layers = nn.Sequential(Widened(12), Widened(12), Widened(12))
            self.head = nn.Linear(12, NUM_CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.layers(self.embed(x))))

    return ResidualMLP()


@entry("MLP on a table with categories, which are embedded", "categories")
def embeddings() -> nn.Module:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.numbers = nn.Embedding(CATEGORIES, 4), nn.Linear(3, 8)
            self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(12, NUM_CLASSES)

        def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
            x = torch.cat([self.numbers(numbers), self.embed(kinds).flatten(1)], 1)
            return self.head(F.relu(self.second(F.relu(self.first(x)))))

    return Embeddings()


# Text


SEQ_CLS = (("task_type", "SEQ_CLS"),)


@entry("BERT, from transformers", "tokens", "query value", "classifier", SEQ_CLS)
def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=LENGTH,
            num_labels=NUM_CLASSES,
            initializer_range=0.2,
        )
    )


@entry("DistilBERT, from transformers", "tokens", "q_lin v_lin", "pre_classifier classifier", SEQ_CLS)
def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            n_layers=2,
            n_heads=2,
            dim=16,
            hidden_dim=24,
            num_labels=NUM_CLASSES,
            initializer_range=0.2,
        )
    )


@entry("ALBERT, from transformers: one layer's weights, three times", "tokens", "query value", "classifier")
def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=LENGTH,
            num_labels=NUM_CLASSES,
            initializer_range=0.2,
        )
    )


def _gpt2_config(**more: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=3,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        use_cache=False,
        **more,
    )


@entry("GPT-2 for classes, from transformers", "tokens", "c_attn", "score", (("fan_in_fan_out", True),))
def gpt2() -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(_gpt2_config(num_labels=NUM_CLASSES, pad_token_id=0))


@entry("T5's encoder, from transformers, and a head of one's own", "tokens", "q v")
def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = T5EncoderModel(
                T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
            )
            self.head = nn.Linear(16, NUM_CLASSES)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            counting = attention_mask.unsqueeze(-1).to(x.dtype)
            return self.head((x * counting).sum(1) / counting.sum(1))

    return Encoded()


@entry("LSTM on tokens", "tokens", mask=False)
def text_lstm() -> nn.Module:
    class Read(Recurrent):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)

    return Read(nn.LSTM, nn.Embedding(VOCABULARY, 8, padding_idx=0))


@entry(
    "GPT-2 for the next token, from transformers, head tied to the embedding",
    "sentences",
    "c_attn",
    "",
    (("fan_in_fan_out", True), ("task_type", "CAUSAL_LM")),
)
def gpt2_lm() -> nn.Module:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(_gpt2_config())


# More than one label, more than one input


@entry("U-Net: a class for each pixel", "pictures_with_masks")
def unet() -> nn.Module:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down, self.bottom = _unit(3, 8), _unit(8, 12, 2), _unit(12, 16, 2)
            self.middle, self.up = _unit(16 + 12, 12), _unit(12 + 8, 8)
            self.head = nn.Conv2d(8, NUM_CLASSES, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.stem(x)
            b = self.down(a)
            c = F.interpolate(self.bottom(b), scale_factor=2.0)
            d = F.interpolate(self.middle(torch.cat([b, c], 1)), scale_factor=2.0)
            return self.head(self.up(torch.cat([a, d], 1)))

    return UNet()


@entry("convolutions at full resolution: a class for each pixel", "pictures_with_masks")
def per_pixel() -> nn.Module:
    class PerPixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(_unit(3, 8), _unit(8, 8), _unit(8, 8))
            self.head = nn.Conv2d(8, NUM_CLASSES, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    return PerPixel()


@entry("an image and numbers, joined early", "image_and_numbers")
def two_inputs() -> nn.Module:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 8)
            self.joined, self.second, self.head = nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, NUM_CLASSES)

        def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
            x = torch.cat([self.conv(image).flatten(1), self.linear(numbers)], 1)
            return self.head(F.relu(self.second(F.relu(self.joined(x)))))

    return TwoInputs()


@entry("an image and numbers, two towers joined at the end", "image_and_numbers")
def two_towers() -> nn.Module:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Sequential(_unit(3, 8, 2), _unit(8, 12, 2))
            self.numbers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.head = nn.Linear(20, NUM_CLASSES)

        def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
            return self.head(torch.cat([self.image(image).mean((2, 3)), self.numbers(numbers)], 1))

    return TwoTowers()


# timm's, where it is installed


if importlib.util.find_spec("timm"):

    @entry("ResNet with anti-aliasing, from timm", "images", head="fc", size=16)
    def timm_resnet() -> nn.Module:
        import timm

        return timm.create_model("test_resnet", pretrained=False, num_classes=NUM_CLASSES)

    @entry("EfficientNet, from timm", "images", head="classifier", size=16)
    def timm_efficientnet() -> nn.Module:
        import timm

        return timm.create_model("test_efficientnet", pretrained=False, num_classes=NUM_CLASSES)
