"""The handwritten digits with captions, such as "a photo of the digit seven", as tokens of a text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qwt2.data import DATASETS
from qwt2.data.digits import Digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The first caption is the one that zero-shot classification asks with.
TEMPLATES = (
    "a photo of the digit {}", "a picture of a {}", "the number {} on a coloured background", "a handwritten {}", "{}"
)  # fmt: skip
_PADDING, _END = "<padding>", "<end>"
VOCABULARY = (_PADDING, _END, *sorted({*" ".join(TEMPLATES).split(), *DIGITS} - {"{}"}))
LENGTH = max(len(template.split()) for template in TEMPLATES) + 1  # tokens of a caption, with the end


@DATASETS.register("digits_captions")
@dataclass
class CaptionedDigits(Digits):
    """The images of :class:`qwt2.data.digits.Digits`; a class's captions are the :data:`TEMPLATES` with its name."""

    TASK: ClassVar[str] = "zero_shot"


def captions(template: str) -> np.ndarray:
    """Return the tokens (10, LENGTH), int64, of one caption per class.

    Padding comes first, so that the end of every caption is the last token.
    """
    texts = [[*template.format(digit).split(), _END] for digit in DIGITS]
    padded = [[_PADDING] * (LENGTH - len(text)) + text for text in texts]
    return np.array([[VOCABULARY.index(word) for word in text] for text in padded], np.int64)
