"""Training of the micro detectors from scratch with mmengine's Runner."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qwt2.data.coco import Scenes
from qwt2.detection.models import quiet
from qwt2.detection.scenes import dataset_config


def train(detector: nn.Module, config: Any, scenes: Scenes, cfg: Mapping[str, Any]) -> nn.Module:
    """Train ``detector`` in place on the training split, by AdamW with linear warm-up and cosine decay.

    With the same number of threads, every run gives the same weights.

    Args:
        detector: the mmdet detector.
        config: the detector's configuration, from :func:`qwt2.detection.models.detector_config`.
        scenes: the dataset.
        cfg: ``steps``, ``batch_size``, ``learning_rate``, ``weight_decay``, ``warmup_steps`` and ``seed``. The seed
            determines the order of the images and everything random inside the detector.

    Returns:
        ``detector``, in evaluation mode.
    """
    from mmengine.runner import Runner

    with tempfile.TemporaryDirectory(prefix="qwt2-train-") as folder, torch.random.fork_rng(devices=[]), quiet():
        runner = Runner(
            model=detector,
            work_dir=folder,
            train_dataloader={
                "batch_size": cfg["batch_size"],
                "num_workers": 0,
                "sampler": {"type": "InfiniteSampler", "shuffle": True, "seed": cfg["seed"]},
                "dataset": dataset_config(config, scenes, "train", training=True),
            },
            train_cfg={"type": "IterBasedTrainLoop", "max_iters": cfg["steps"], "val_interval": cfg["steps"] + 1},
            optim_wrapper={
                "optimizer": {"type": "AdamW", "lr": cfg["learning_rate"], "weight_decay": cfg["weight_decay"]},
                "clip_grad": {"max_norm": 10.0},
            },
            param_scheduler=_schedule(cfg),
            default_hooks={"checkpoint": None, "logger": None, "sampler_seed": None},
            randomness={"seed": cfg["seed"]},
            default_scope="mmdet",
            log_level="ERROR",
            experiment_name="qwt2",
        )
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints how long it took to read the annotations
            runner.train()
    return detector.eval()


def _schedule(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    warmup = min(cfg["warmup_steps"], cfg["steps"])
    schedule = [
        {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 0, "end": cfg["steps"], "T_max": cfg["steps"]}
    ]
    if warmup:
        schedule.insert(0, {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": warmup})
    return schedule
