"""A detector through the whole chain: quantized, compensated, folded, exported in parts and run inside mmdet."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from pipeline.tasks.detection import part_exporters
from qwt2 import Precision, compensate, fold, load_engine, load_quantized, quantize, save_quantized
from qwt2.capture.batch import call, first, image_count
from qwt2.capture.export import capture
from qwt2.capture.graph import GraphModel
from qwt2.detection.models import build_detector, detector_config
from qwt2.detection.network import Detector, parts, regions
from qwt2.detection.parts import DENSE, part_inputs, part_names, running_on, simulation_runs
from qwt2.detection.pictures import draw_grid
from qwt2.detection.scenes import Batches, build_dataset, detect, shown
from qwt2.errors import Qwt2Error
from qwt2.evaluation.mismatch import engine_mismatch, fold_mismatch, record_modules
from qwt2.onnx.file import load_onnx
from qwt2.quantization.info import quantized_layers
from qwt2.quantization.layers import full_precision
from tests.support import tiny_detectors

pytestmark = pytest.mark.slow

KINDS = {"swin": "repq", "resnet": "percentile"}
ENGINES = ("onnxruntime", "openvino")
THREE = ["/0of3", "/1of3", "/2of3"]  # query, key and value


@functools.cache
def captured(kind: str) -> tuple[Detector, list, GraphModel]:
    """A float detector, its calibration batches, and what `quantize` would capture of it; all to be read only."""
    network = Detector(tiny_detectors.detector(kind)).eval()
    batches = tiny_detectors.batches(kind, network)
    return network, batches, capture(network, first(batches[0], 2))


def quantized(kind: str, bits: int, names: tuple[str, ...] = ("backbone", "neck", "heads")) -> GraphModel:
    network, batches, graph = captured(kind)
    chosen = parts(network.detector, list(names))
    return quantize(graph, batches, KINDS[kind], Precision(bits, bits), observer_images=2, parts=chosen)


@dataclass
class Chain:
    """One small detector, quantized to W4A4 (`plain`) and compensated by CWAC (`qmodel`)."""

    kind: str
    network: Detector
    graph: GraphModel
    batches: list
    plain: GraphModel
    qmodel: GraphModel
    files: dict[str, Path]


@pytest.fixture(scope="module", params=KINDS)
def chain(request, tmp_path_factory) -> Chain:
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    network, batches, graph = captured(kind)
    plain = quantized(kind, 4)
    qmodel = copy.deepcopy(plain)
    compensate(qmodel, batches, "cwac")
    folded, files = fold(qmodel), {}
    for part, exporter in part_exporters(qmodel, batches[0]).items():
        files[part] = folder / f"{part}.onnx"
        exporter.export(folded, files[part])
    return Chain(kind, network, graph, batches, plain, qmodel, files)


def leaves(output) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]


def validation(kind: str, batch_size: int = 3) -> Batches:
    config = detector_config(tiny_detectors.settings(kind))
    return Batches(config, build_dataset(config, tiny_detectors.scenes(), "val"), batch_size)


# The network.


@pytest.mark.parametrize("kind", KINDS)
def test_network_computes_what_mmdets_detector_computes(kind):
    """Head outputs on the detector's own regions equal those inside the detector's `predict`."""
    network = Detector(tiny_detectors.detector(kind))
    seen = {}
    heads = part_names(network)[1:]
    [images, samples], *_ = validation(kind)
    handles = [network.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: seen.update({n: (a[0], y)})) for n in heads]
    with torch.no_grad():
        network.detector.predict(images, samples, rescale=False)
        for handle in handles:
            handle.remove()
        inside = dict(seen)
        # As many regions as the detector has itself, in its order (an image at a time).
        inputs = regions(network.detector, images[:1], samples[:1], 16, 5)
        outputs = network(**inputs)
    assert len(outputs) == 1 + len(heads)
    count = len(leaves(outputs[1])[0])
    for mine, theirs in zip(leaves(outputs[1]), leaves(inside[heads[0]][1])):
        torch.testing.assert_close(mine, theirs[:count], rtol=1e-3, atol=1e-3)


def test_regions_are_repeated_where_the_detector_finds_too_few():
    network = Detector(tiny_detectors.detector("swin"))
    [images, samples], *_ = validation("swin")
    inputs = regions(network.detector, images, samples, 40, 12)
    assert inputs["boxes"].shape == (3, 1, 40, 4) and inputs["mask_boxes"].shape == (3, 12, 4)
    few = regions(network.detector, images, samples, 4, 2)
    torch.testing.assert_close(inputs["boxes"][:, :, :4], few["boxes"])
    network.detector.roi_head.test_cfg.score_thr = 1.1  # nothing is found: the masks' regions are proposals then
    nothing = regions(network.detector, images, samples, 4, 2)
    torch.testing.assert_close(nothing["mask_boxes"], nothing["boxes"][:, 0, :2])


@pytest.mark.parametrize(
    "names, message", [(["spine"], "model.parts names 'spine'; choose some of backbone, neck, heads"), ([], "model.parts")]
)
def test_unknown_parts_are_refused(names, message):
    with pytest.raises(Qwt2Error, match=message):
        parts(tiny_detectors.detector("swin"), names)


# Quantization and compensation.


def test_everything_with_weights_is_quantized(chain):
    kept = {name for name, module in chain.qmodel.named_modules() if type(module) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)}
    assert not kept
    info = chain.qmodel.quantization
    layers = "\n".join(info.layers)
    for part in ("backbone", "neck.lateral_convs.2", "neck.fpn_convs.0", "rpn_head.rpn_conv", "bbox_head.fc_reg", "mask_head.upsample"):
        assert part in layers
    # The RPN runs on every level of the pyramid; backbone and box head run once.
    assert set(info.repeated) == {f"detector.rpn_head.{name}" for name in ("rpn_conv", "rpn_cls", "rpn_reg")}
    assert len(info.matmuls) == {"swin": 8, "resnet": 0}[chain.kind]
    assert not info.float_modules


def test_only_the_parts_asked_for_are_quantized():
    _, batches, _ = captured("resnet")
    qmodel = quantized("resnet", 4, ("backbone", "neck"))
    assert all(name.startswith(("detector.backbone.", "detector.neck.")) for name in qmodel.quantization.layers)
    assert type(qmodel.get_submodule("detector.roi_head.bbox_head.fc_cls")) is nn.Linear
    assert qmodel.quantization.float_modules["detector.rpn_head.rpn_conv"] == "is not among the parts to quantize"
    # What is not quantized computes what it did, on what the backbone gives it.
    compensate(qmodel, batches, "cwac")
    assert torch.isfinite(leaves(call(fold(qmodel), batches[0]))[0]).all()


def test_cwac_fits_every_quantized_module_on_the_full_precision_networks_output(chain):
    """Against moments taken over all runs of a module in both networks, as the closed form says."""
    layers = quantized_layers(chain.qmodel)
    name = "detector.rpn_head.rpn_conv"
    assert layers[name].alpha is not None
    uncompensated, target = runs_of(chain, name)
    images = sum(image_count(batch) for batch in chain.batches)
    alpha, beta = kept_by_chance(*closed_form(uncompensated, target), uncompensated, target, images)
    torch.testing.assert_close(layers[name].alpha.double(), alpha, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layers[name].beta.double(), beta, rtol=1e-3, atol=1e-3)


def runs_of(chain: Chain, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, positions): what a layer gives before compensation in the quantized network, and in the fp32 network."""
    layer = chain.qmodel.get_submodule(name)
    quantized, exact = [], []

    def flat(y: torch.Tensor) -> torch.Tensor:
        return y.transpose(0, 1).flatten(1).double()

    for batch in chain.batches:
        inputs: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
        with torch.no_grad():
            call(chain.qmodel, batch)
            quantized += [flat(layer.with_bias(layer.products(x))) for x in inputs]
            inputs.clear()
            with full_precision(chain.qmodel):
                call(chain.qmodel, batch)
            exact += [flat(layer.full_precision(x)) for x in inputs]
        handle.remove()
    return torch.cat(quantized, 1), torch.cat(exact, 1)


def closed_form(y_q: torch.Tensor, y_f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = cov(y_q, y_f) / var(y_q), beta = mean(y_f) - alpha mean(y_q)."""
    mean_q, mean_f = y_q.mean(1), y_f.mean(1)
    alpha = ((y_q - mean_q[:, None]) * (y_f - mean_f[:, None])).mean(1) / y_q.var(1, unbiased=False)
    return alpha, mean_f - alpha * mean_q


def kept_by_chance(
    alpha: torch.Tensor, beta: torch.Tensor, y_q: torch.Tensor, y_f: torch.Tensor, images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The share 1 - 2 R / (n (E - R)) of alpha - 1 and of the means' shift, with errors E before and R after them.

    n is the geometric mean of the numbers of images and of values per channel.
    """
    n = (images * y_q.shape[1]) ** 0.5
    centred_q, centred_f = y_q - y_q.mean(1, keepdim=True), y_f - y_f.mean(1, keepdim=True)
    before = (centred_q - centred_f).square().mean(1).sum()
    fitted = (alpha[:, None] * centred_q - centred_f).square().mean(1).sum()
    shift = alpha * y_q.mean(1) + beta - y_q.mean(1)
    gap = (y_f - y_q).mean(1).square().sum()
    kept_alpha = (1 - 2 * fitted / (n * (before - fitted))).clamp(min=0)
    kept_shift = (1 - 2 * before / (n * gap)).clamp(min=0)
    alpha = 1 + kept_alpha * (alpha - 1)
    return alpha, (1 - alpha) * y_q.mean(1) + kept_shift * shift


def test_compensation_brings_the_outputs_closer(chain):
    with torch.no_grad():
        exact, before, after = (
            torch.cat([leaf.flatten() for batch in chain.batches for leaf in leaves(call(model, batch))])
            for model in (chain.network, chain.plain, chain.qmodel)
        )
    assert (after - exact).square().mean() < 0.9 * (before - exact).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_qwt_stands_beside_blocks_of_the_backbone(kind):
    report = compensate(quantized(kind, 3), captured(kind)[1], "qwt")
    blocks = [module.module for module in report.modules]
    prefix = "detector.backbone.stages" if kind == "swin" else "detector.backbone.layer"
    assert len(blocks) == {"swin": 4, "resnet": 6}[kind] and all(name.startswith(prefix) for name in blocks)
    assert sum(module.kept for module in report.modules) >= len(blocks) // 2


def test_images_of_several_sizes_calibrate(tmp_path):
    """Batches padded to different sizes: none may be resized, and every position counts."""
    network = Detector(tiny_detectors.detector("swin"))
    network.detector.eval()
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]])
    batches = [
        {
            "images": torch.randn(2, 3, *size, generator=generator),
            "boxes": corners.expand(2, 1, 2, 4).clone(), "mask_boxes": corners[:1].expand(2, 1, 4).clone(),
        }
        for size in ((64, 96), (80, 112))
    ]  # fmt: skip
    structure = {"parts": parts(network.detector, ["backbone", "neck", "heads"])}
    qmodel = quantize(network, batches, "repq", Precision(4, 4), observer_images=4, **structure)
    for method in ("cwac", "qwt"):
        report = compensate(qmodel, batches, method)
        assert any(module.kept for module in report.modules)
    with torch.no_grad():
        sizes = [leaves(call(qmodel, batch))[0].shape[-2:] for batch in batches]
    assert sizes == [(16, 24), (20, 28)]


def test_stored_detectors_load_again(chain, tmp_path):
    save_quantized(chain.qmodel, tmp_path / "model.safetensors")
    loaded = load_quantized(chain.network, tmp_path / "model.safetensors")
    with torch.no_grad():
        for mine, theirs in zip(leaves(call(loaded, chain.batches[1])), leaves(call(chain.qmodel, chain.batches[1])), strict=True):
            assert torch.equal(mine, theirs)


# Folding and engines.


def test_folding_changes_nothing(chain):
    worst = fold_mismatch(chain.qmodel, fold(chain.qmodel), chain.batches[0])
    assert max(mismatch.steps for mismatch in worst.values()) < 1.01


def test_files_hold_every_quantized_module_once(chain):
    assert list(chain.files) == [DENSE, "detector.roi_head.bbox_head", "detector.roi_head.mask_head"]
    names = [tensor.name for path in chain.files.values() for tensor in load_onnx(path).graph.initializer]
    layers = chain.qmodel.quantization.layers
    # Files have a layer for each of query, key and value.
    expected = [f"{layer}.weight_scale{part}" for layer in layers for part in (THREE if layer.endswith(".qkv") else [""])]
    assert sorted(name for name in names if ".weight_scale" in name) == sorted(expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_on_engines_are_within_a_step_of_the_simulation(chain, engine):
    folded = fold(chain.qmodel)
    records = between_codes(folded, record_modules(folded, chain.batches[0]))
    exporters = part_exporters(chain.qmodel, chain.batches[0])
    for part, path in chain.files.items():
        mine = {name: array for name, array in records.items() if exporters[part].holds(name)}
        assert mine
        worst = engine_mismatch(load_onnx(path), engine, mine, 1)
        assert max(mismatch.steps for mismatch in worst.values()) < 1.5


def between_codes(folded: nn.Module, records: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Records of slightly larger inputs. RoIAlign averages values on a grid, and many averages lie exactly between two
    codes of the head's coarser grid, which engines that multiply by the inverse of a scale round the other way."""
    moved = {name: array * np.float32(1.0003) for name, array in records.items() if not name.endswith(".result")}
    for name, array in moved.items():
        module, role = name.rsplit(".", 1)
        scale = getattr(folded.get_submodule(module), role).scale.numpy()
        moved[name] = array + np.float32(1e-3) * scale * (np.abs(array / scale % 1 - 0.5) < 1e-4)
    for name in [name.removesuffix(".result") for name in records if name.endswith(".result")]:
        arguments = [torch.from_numpy(moved[f"{name}.{role}"]) for role in ("input", "a", "b") if f"{name}.{role}" in moved]
        with torch.no_grad():
            moved[f"{name}.result"] = folded.get_submodule(name)(*arguments).numpy()
    return moved


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_inside_mmdet_detect_what_the_simulation_detects(chain, engine):
    """On images that are smaller than the exported size too; and the detector is as it was afterwards."""
    batches = validation(chain.kind)
    runs = {part: load_engine(path, engine) for part, path in chain.files.items()}
    before = {name: tensor.clone() for name, tensor in chain.network.state_dict().items()}
    exact = detect(chain.network.detector, batches)
    with running_on(chain.network, simulation_runs(chain.qmodel), (128, 128)) as detector:
        simulated = detect(detector, batches)
    with running_on(chain.network, runs, (128, 128)) as detector:
        found = detect(detector, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.network.state_dict().items())
    again = detect(chain.network.detector, batches)
    assert all(torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes) for a, b in zip(exact, again))
    assert [len(s.pred_instances) for s in found] == [len(s.pred_instances) for s in simulated]

    def scores(samples) -> np.ndarray:
        return np.concatenate([sample.pred_instances.scores.numpy() for sample in samples])

    # Whole networks of few bits differ by rounding alone; they are far closer to each other than to fp32.
    assert np.abs(scores(found) - scores(simulated)).mean() < 0.2 * np.abs(scores(exact) - scores(simulated)).mean() + 1e-3


def test_parts_with_full_precision_inside_mmdet_change_nothing(chain):
    """The captured parts in place of mmdet's own modules give mmdet's detections, whatever the number of regions."""
    batches = validation(chain.kind)
    expected = detect(chain.network.detector, batches)
    with running_on(chain.network, simulation_runs(chain.graph), (128, 128)) as detector:
        found = detect(detector, batches)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.pred_instances.bboxes, theirs.pred_instances.bboxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine.pred_instances.scores, theirs.pred_instances.scores, rtol=1e-4, atol=1e-5)
        assert (mine.pred_instances.masks == theirs.pred_instances.masks).float().mean() > 0.999


def test_images_larger_than_the_exported_ones_are_refused(chain):
    runs = dict.fromkeys(part_names(chain.network), lambda x: x)
    with running_on(chain.network, runs, (96, 128)) as detector:
        with pytest.raises(Qwt2Error, match="image of 128 x 128 pixels is larger than the exported 96 x 128"):
            detect(detector, validation(chain.kind))


def test_part_inputs_are_what_the_parts_are_called_with(chain):
    inputs = part_inputs(chain.qmodel, first(chain.batches[0], 1))
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {
        DENSE: (1, 3, 128, 128), "detector.roi_head.bbox_head": (4, 16, 7, 7), "detector.roi_head.mask_head": (2, 16, 14, 14)
    }  # fmt: skip


# The other families, at full depth of wiring and few channels.


def images_and_samples(count: int = 2, size: tuple[int, int] = (64, 96)):
    from mmdet.structures import DetDataSample

    facts = {"img_shape": size, "ori_shape": size, "batch_input_shape": size, "scale_factor": (1.0, 1.0)}
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
    return images, [DetDataSample(metainfo=facts) for _ in range(count)]


def narrow_chain(name: str, method: str) -> tuple[Detector, list, nn.Module]:
    """Network, calibration batches and the model quantized to W8A8 and compensated by CWAC."""
    cfg = tiny_detectors.narrow(name)
    network = Detector(tiny_detectors.with_signal(build_detector(cfg))).eval()
    images, samples = images_and_samples()
    batches = [regions(network.detector, images[i : i + 1], samples[i : i + 1], 4, 2) for i in range(2)]
    structure = {"parts": parts(network.detector, cfg["parts"])}
    qmodel = quantize(network, batches, method, Precision(8, 8), observer_images=2, **structure)
    compensate(qmodel, batches, "cwac")
    return network, batches, qmodel


def test_cascade_of_heads_is_compensated_and_folded():
    network, batches, qmodel = narrow_chain("cascade_mask_rcnn_swin_small", "repq")
    heads = [name for name in qmodel.quantization.layers if ".roi_head." in name]
    for stage in range(3):
        assert {f"detector.roi_head.bbox_head.{stage}.shared_convs.3.conv", f"detector.roi_head.mask_head.{stage}.conv_logits"} <= set(heads)
    assert batches[0]["boxes"].shape == (1, 3, 4, 4)
    assert max(mismatch.steps for mismatch in fold_mismatch(qmodel, fold(qmodel), batches[0]).values()) < 1.01


def test_transformer_detects_on_an_engine_what_the_simulation_detects(tmp_path):
    network, batches, qmodel = narrow_chain("detr_resnet50", "percentile")
    assert len(qmodel.quantization.matmuls) == 6 and qmodel.quantization.float_modules == {}
    [(part, exporter)] = part_exporters(qmodel, batches[0]).items()
    exporter.export(fold(qmodel), tmp_path / "dense.onnx")
    images, samples = images_and_samples()
    with torch.no_grad():
        with running_on(network, simulation_runs(qmodel), (64, 96)) as detector:
            simulated = [found.pred_instances.scores for found in detector.predict(images, samples, rescale=False)]
        with running_on(network, {part: load_engine(tmp_path / "dense.onnx", "onnxruntime")}, (64, 96)) as detector:
            found = [found.pred_instances.scores for found in detector.predict(images, samples, rescale=False)]
            with pytest.raises(Qwt2Error, match="an image of 64 x 80 pixels does not have the exported size 64 x 96"):
                detector.predict(images[..., :80], samples, rescale=False)
    for mine, theirs in zip(found, simulated, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.01)


# Pictures.


def test_grid_shows_each_scene_in_every_column():
    import io

    from PIL import Image

    samples = detect(tiny_detectors.detector("resnet"), validation("resnet"))[:2]
    found = [shown(sample, least_score=0.0) for sample in samples]
    assert all(len(scene["boxes"]) == len(scene["masks"]) == len(scene["labels"]) > 0 for scene in found)
    nothing = [dict(scene, boxes=[], labels=[], scores=[], masks=[]) for scene in found]
    scenes = tiny_detectors.scenes()
    grid = Image.open(io.BytesIO(draw_grid({"fp32": found, "PTQ": nothing}, scenes.images["val"], scenes.classes)))
    assert grid.size == (2 * 256 + 8, 22 + 2 * 256 + 8)
    left, right = (np.asarray(grid.crop((x, 22, x + 256, 278))).astype(int) for x in (0, 264))
    plain = np.asarray(Image.open(scenes.images["val"] / found[0]["file"]).resize((256, 256))).astype(int)
    assert np.abs(right - plain).mean() < 2 < np.abs(left - plain).mean()
