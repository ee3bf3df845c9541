"""The noise that diffusion models learn to predict (DDPM, arXiv 2006.11239, section 4: linear schedule)."""

from __future__ import annotations

import numpy as np

from pipeline.experimental.arrays import Arrays

TIMESTEPS = 1000
# Share of the image's variance that is left after each timestep (alpha bar, equation 4).
SIGNAL = np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS))


def noisy(images: np.ndarray, labels: np.ndarray, timesteps: np.ndarray, noise: np.ndarray) -> Arrays:
    """Return a network's inputs: images after ``timesteps`` of noise (equation 4), the timesteps, and the labels.

    Args:
        images: (N, 1, 8, 8), float32.
        labels, timesteps: (N,), int64.
        noise: of the images' shape, of unit variance.
    """
    signal = SIGNAL[timesteps].reshape(-1, 1, 1, 1)
    mixed = np.sqrt(signal) * images + np.sqrt(1 - signal) * noise
    return {"images": mixed.astype(np.float32), "timesteps": timesteps, "labels": labels}


def draw(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[Arrays, np.ndarray]:
    """Return a network's inputs at random timesteps, one per image, and the noise that is in them, float32."""
    noise = rng.standard_normal(images.shape, np.float32)
    return noisy(images, labels, rng.integers(0, TIMESTEPS, len(images)), noise), noise
