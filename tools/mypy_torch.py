"""What mypy cannot know of PyTorch: attributes of a module that is found by its name, and arguments of a graph's nodes.

PyTorch declares the first as "a tensor or a module" and the second as one of twenty types. Nothing that reads them
would pass without a cast that checks nothing, so they count as `Any`.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, MethodContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

MODULE = "torch.nn.modules.module.Module."
NODE = {f"torch.fx.node.Node.{name}" for name in ("args", "kwargs", "target")}


class Torch(Plugin):
    """See the module's docstring."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """Return what decides the type of an attribute."""
        if fullname.startswith(MODULE):
            return any_for_unions
        return any_type if fullname in NODE else None

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        """Return what decides the type of a method's result."""
        return any_type if fullname.endswith(".get_submodule") else None


def any_for_unions(context: AttributeContext) -> Type:
    """Return `Any` for what `Module.__getattr__` gives; attributes that are declared keep their type."""
    declared = get_proper_type(context.default_attr_type)
    return any_type(context) if isinstance(declared, UnionType) else declared


def any_type(context: AttributeContext | MethodContext) -> Type:
    """Return `Any`."""
    return AnyType(TypeOfAny.special_form)


def plugin(version: str) -> type[Plugin]:
    """Return the plugin's class, as mypy asks for it."""
    return Torch
