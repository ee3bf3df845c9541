"""TensorRT on an NVIDIA GPU, for files of the target "tensorrt"."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx

from qwt2.engines import ENGINES
from qwt2.engines.operations import Operation
from qwt2.errors import Qwt2Error
from qwt2.extras import extra
from qwt2.onnx.tensorrt_rules import check

if TYPE_CHECKING:
    import tensorrt


@ENGINES.register("tensorrt")
class TensorRTSession:
    """See :class:`qwt2.engines.Session`; ``threads`` has no effect on a GPU.

    Raises:
        Qwt2Error: TensorRT or a GPU is missing, the file breaks TensorRT's rules (:mod:`qwt2.onnx.tensorrt_rules`),
            or TensorRT cannot read or build the model.
    """

    package = "tensorrt"

    def __init__(self, model: onnx.ModelProto, threads: int):
        if violations := check(model):
            raise Qwt2Error(
                f"TensorRT cannot run this file: {violations[0]}; quantize the model with target='tensorrt'"
            )
        with extra("tensorrt"):
            import tensorrt as trt
        self.logger = trt.Logger(trt.Logger.ERROR)
        plan = _build(model, self.logger)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()
        self.outputs = [value.name for value in model.graph.output]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`qwt2.engines.Session.__call__`."""
        import torch

        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in feeds.items()}
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}
        outputs = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        for name, tensor in (inputs | outputs).items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise Qwt2Error("TensorRT could not run the model; its log on stderr says why")
        stream.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def operations(self) -> list[Operation]:
        """See :meth:`qwt2.engines.Session.operations`; TensorRT reports the input formats of every layer."""
        import tensorrt as trt

        text = self.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return [
            Operation(layer["LayerType"], any("Int8" in tensor["Format/Datatype"] for tensor in layer["Inputs"]))
            for layer in json.loads(text)["Layers"]
        ]


def _build(model: onnx.ModelProto, logger: tensorrt.ILogger) -> tensorrt.IHostMemory:
    """Compile the model with the types that the file states (a strongly typed network)."""
    import tensorrt as trt

    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind raises one of these for a null pointer
        raise Qwt2Error("TensorRT found no usable NVIDIA GPU; run this file on another engine") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise Qwt2Error(f"TensorRT cannot read the model: {'; '.join(reasons)[:300]}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Qwt2Error("TensorRT could not build the model; its log on stderr says why")
    return plan
