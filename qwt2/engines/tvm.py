"""Apache TVM: the file is imported to Relax, its quantized products are rewritten in integers, and LLVM compiles it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation
from qwt2.extras import extra
from qwt2.io import quiet
from qwt2.onnx.file import with_constant_shapes

if TYPE_CHECKING:
    from tvm import IRModule, relax
    from tvm.tirx import PrimFunc

_PRODUCTS = ("matmul", "conv2d")


@ENGINES.register("tvm")
class TvmSession:
    """See :class:`qwt2.engines.Session`.

    TVM's importer leaves products of dequantized codes in float32. They are replaced here by int32 products of the
    codes, which are scaled once at the end; TVM's default schedules have no int8 kernels. The bias is added in float32.
    The model always runs on one thread, because TVM parallelizes no loop without tuning.
    """

    package = "tvm"

    def __init__(self, model: onnx.ModelProto, threads: int):
        with extra("tvm"):
            import tvm
            from tvm import relax
            from tvm.relax.frontend.onnx import from_onnx

        target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        with quiet():  # the importer warns about every name that is not an identifier
            imported = from_onnx(with_constant_shapes(model))
        module = in_integers(imported)
        with target:
            self.optimized: IRModule = relax.pipeline.zero_pipeline()(module)
        self.device = tvm.cpu()
        self.machine = relax.VirtualMachine(tvm.compile(self.optimized, target), self.device)

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`qwt2.engines.Session.__call__`."""
        import tvm

        arguments = [tvm.runtime.tensor(np.ascontiguousarray(feeds[name]), self.device) for name in self.inputs]
        results = self.machine["main"](*arguments)
        results = [results] if len(self.outputs) == 1 else results
        return {name: result.numpy() for name, result in zip(self.outputs, results)}

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`; taken from the loop nests that TVM generates code from.

        A fused loop nest is named after the operations that it fuses. It is integer if its product is in int32.
        """
        found = []
        for name, count in _calls(self.optimized["main"]).items():
            kind = re.sub(r"\d+(?=_|$)", "", name.removeprefix("fused_"))
            found += [Operation(kind, _has_integer_product(self.optimized[name]))] * count
        return found


def in_integers(module: IRModule) -> IRModule:
    """Return the module with every product of two dequantized tensors replaced by a product of their codes."""
    from tvm import relax

    @relax.expr_functor.mutator
    class Rewriter(relax.PyExprMutator):
        def visit_call_(self, call):
            call = super().visit_call_(call)
            name = getattr(call.op, "name", "").rpartition(".")[2]
            if name not in _PRODUCTS:
                return call
            a, b = (_codes(argument, self.lookup_binding) for argument in call.args)
            return call if a is None or b is None else _integer_product(call, name, a, b)

    rewriter = Rewriter(module)
    rewriter.builder_.update_func(module.get_global_var("main"), rewriter.visit_expr(module["main"]))
    return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@dataclass(frozen=True)
class _Codes:
    """A quantized tensor.

    Attributes:
        values: int32 codes minus their zero point.
        scale: float32, of shape () or (channels,).
    """

    values: relax.Expr
    scale: np.ndarray


def _codes(expr: relax.Expr, binding: Any) -> _Codes | None:
    """Return the codes that ``expr`` dequantizes, directly or behind a reshape or transpose; ``None`` for any other."""
    from tvm import relax

    call = binding(expr) if isinstance(expr, relax.Var) else expr
    name = getattr(getattr(call, "op", None), "name", "")
    if name in ("relax.reshape", "relax.permute_dims"):
        inner = _codes(call.args[0], binding)
        if inner is None or inner.scale.ndim:
            return None
        if name == "relax.reshape":
            return _Codes(relax.op.reshape(inner.values, call.args[1]), inner.scale)
        return _Codes(relax.op.permute_dims(inner.values, call.attrs.axes), inner.scale)
    if name != "relax.dequantize":
        return None
    scale, zero_point = (constant.value.numpy() for constant in call.args[1:])
    values = relax.op.astype(call.args[0], "int32")
    if zero_point.any():
        values = relax.op.subtract(values, relax.const(zero_point.astype(np.int32), "int32"))
    return _Codes(values, scale)


def _integer_product(call: relax.Call, name: str, a: _Codes, b: _Codes) -> relax.Expr:
    from tvm import relax

    scale = a.scale * b.scale
    if name == "matmul":
        product = relax.op.matmul(a.values, b.values, out_dtype="int32")
    else:
        keep = {key: call.attrs[key] for key in ("strides", "padding", "dilation", "groups")}
        product = relax.op.nn.conv2d(a.values, b.values, **keep, out_dtype="int32")
        scale = scale.reshape(-1, 1, 1)
    return relax.op.multiply(relax.op.astype(product, "float32"), relax.const(scale, "float32"))


def _calls(function: relax.Function) -> Counter:
    """Return how often a Relax function calls each compiled function."""
    from tvm import relax

    calls: Counter = Counter()

    def visit(expr):
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            calls[expr.args[0].name_hint] += 1

    relax.analysis.post_order_visit(function, visit)
    return calls


def _has_integer_product(function: PrimFunc) -> bool:
    """Return whether a loop nest has a product in int32.

    The scaling is fused behind the product, so the product's sums are in an intermediate buffer.
    """
    buffers = function.body.block.alloc_buffers
    products = [buffer for buffer in buffers if any(product in buffer.name.lower() for product in _PRODUCTS)]
    return any(str(buffer.dtype) == "int32" for buffer in products)
