"""T5's states of one text that is encoded by itself, so that they are the same bit for bit wherever it is used."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from trainer.data.codec_windows import reproducible


@torch.no_grad()
def text_states(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor | None:
    """T5's last hidden states of a prompt, (S, D) float32 on the encoder's device, the end token </s> included.

    None for an empty prompt, or one of spaces alone: the null condition. No prompt is cut, however long: T5's positions
    are relative. In a batch, as the cache encodes captions, the products may round otherwise.
    """
    if not prompt.strip():
        return None
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    with reproducible(encoder.device):
        states_1SD = encoder(input_ids=torch.tensor([tokens], device=encoder.device)).last_hidden_state
    return states_1SD[0].float()
