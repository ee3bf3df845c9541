"""A BERT-like sentence encoder with the weights and the tokenizer that an installed package carries."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from qwt2.extras import extra, packaged_file


class SentenceEncoder(nn.Module):
    """The mean of BERT's last hidden states over a text's tokens, scaled to unit length (arXiv 1908.10084).

    Args:
        bert: the transformer.
    """

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the vectors (N, hidden) of texts (N, tokens), given as int64; the mask is 0 where padded."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None].to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def build_encoder(package: str) -> SentenceEncoder:
    """Build an encoder with random weights from the configuration that a package carries.

    Args:
        package: ``package:folder`` of a model in the layout of Hugging Face, with ``config.json``.

    Returns:
        The encoder, in evaluation mode; ``encoder.bert`` has the names of the package's weights.

    Raises:
        Qwt2Error: the package or transformers is not installed.
    """
    path = packaged_file(f"{package}/config.json")
    with extra("real"):
        from transformers import BertConfig, BertModel

    return SentenceEncoder(BertModel(BertConfig.from_json_file(path), add_pooling_layer=False)).eval()


def load_bert(encoder: SentenceEncoder, weights: str) -> None:
    """Load the weights that a package carries into ``encoder.bert``, in place.

    Args:
        encoder: an encoder from :func:`build_encoder`.
        weights: ``package:file`` of a safetensors file.

    Raises:
        Qwt2Error: the package or the file is missing, or the weights do not fit.
    """
    from qwt2.classification.models import fit_weights, read_state

    state = read_state(packaged_file(weights))
    # The head that pretraining pooled with, and the positions' numbers, are no part of the encoder.
    unused = [name for name in state if name.startswith("pooler.") or name.endswith("position_ids")]
    fit_weights(encoder.bert, {name: state[name] for name in state if name not in unused}, weights)


def tokenize(package: str, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Return ``input_ids`` and ``attention_mask`` (N, length), int64, of texts, cut or padded to ``length`` tokens.

    Args:
        package: as in :func:`build_encoder`, with ``tokenizer.json``.
        texts: the texts.
        length: number of tokens.

    Raises:
        Qwt2Error: the package or tokenizers is not installed.
    """
    path = packaged_file(f"{package}/tokenizer.json")
    with extra("real"):
        from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    names = {"input_ids": "ids", "attention_mask": "attention_mask"}
    return {key: np.array([getattr(one, name) for one in encoded], np.int64) for key, name in names.items()}
