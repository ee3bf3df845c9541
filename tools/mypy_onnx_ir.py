"""What mypy cannot know of onnx-ir: what the nodes and values of a finished graph have.

onnx-ir declares names, a node's graph and each of its inputs as optional: a node may not be in a graph yet, and an
operator may leave an input out. The inputs that an operator needs are always there, and only nodes of a graph are read.
So these attributes count as given; code that reads an input that may be left out still has to ask.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import Instance, Type, get_proper_type
from mypy.types_utils import remove_optional

GIVEN = {f"onnx_ir._core.{name}" for name in ("Node.name", "Node.graph", "Value.name")}
INPUTS = "onnx_ir._core.Node.inputs"


class OnnxIr(Plugin):
    """See the module's docstring."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """Return what decides the type of an attribute."""
        if fullname in GIVEN:
            return given
        return given_entries if fullname == INPUTS else None


def given(context: AttributeContext) -> Type:
    """Return the attribute's type without `None`."""
    return remove_optional(context.default_attr_type)


def given_entries(context: AttributeContext) -> Type:
    """Return the type of a sequence whose entries are not `None`."""
    declared = get_proper_type(context.default_attr_type)
    if not isinstance(declared, Instance):
        return declared
    return declared.copy_modified(args=[remove_optional(entry) for entry in declared.args])


def plugin(version: str) -> type[Plugin]:
    """Return the plugin's class, as mypy asks for it."""
    return OnnxIr
