"""Models: recipes for building them (`spec`), and the built-in ones by name.

Every built-in factory takes `num_classes`, `in_channels` and `width`, a factor on every hidden channel
count. A narrower model's tensors are the leading coordinates of the wide one's. Each unit of a model,
such as a residual block, is one module that is called once, so that a model can be cut behind it.
"""

from __future__ import annotations

from scalefl.errors import ConfigError, nearest

BUILT_IN: dict[str, str] = {
    "cnn": "scalefl.models.cnn:cnn",
    "resnet10": "scalefl.models.resnet:resnet10",
    "resnet18": "scalefl.models.resnet:resnet18",
    "resnet34": "scalefl.models.resnet:resnet34",
    "squeezenet": "scalefl.models.squeezenet:squeezenet",
    "vgg11_bn": "scalefl.models.vgg:vgg11_bn",
    "vit": "scalefl.models.vit:vit",
}


def resolve(name: str) -> str:
    """The "package.module:factory" path of a built-in model; such a path itself is returned as it is.

    Raises:
        ConfigError: neither a path nor a built-in name.
    """
    if name.startswith("<"):
        raise ConfigError(
            f"the model was given from Python, as {name}: give it again (make_config), or name it by a path"
        )
    if ":" in name:
        return name
    if name not in BUILT_IN:
        raise ConfigError(
            f"no built-in model {name!r}{nearest(name, BUILT_IN)}; known: {', '.join(BUILT_IN)}, or your own as "
            "'package.module:factory'"
        )
    return BUILT_IN[name]
