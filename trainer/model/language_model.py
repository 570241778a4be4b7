"""MusicGen's language model: the decoder and the projection of text states, which is what a run trains and saves.

Its tensors have the names that they have in transformers' `MusicgenForConditionalGeneration`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM

from trainer.errors import ModelError
from trainer.model.loss import codebook_cross_entropy
from trainer.model.source import Source


class LanguageModel(nn.Module):
    """Codes and text states in, logits of the next codes out, or their cross entropy."""

    def __init__(self, decoder: MusicgenForCausalLM, enc_to_dec_proj: nn.Linear):
        super().__init__()
        self.decoder = decoder
        self.enc_to_dec_proj = enc_to_dec_proj

    def forward(
        self,
        inputs_BKT: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor,
        attention_BS: Tensor | None = None,
        labels_BKT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, T, V) of each step's codes; where labels are given, the summed cross entropy (K,) instead.

        inputs_BKT    (B, K, T) int64 in [0, V]: the delayed codes, one step late; V is the special token
        text_BSD      (B, S, D) float32: T5's last hidden states, any value where the mask is 0
        text_mask_BS  (B, S) float32: 1 for a text token, 0 for padding. A row of zeros is a null condition: its keys
                      and values become exactly 0, and with them what cross-attention adds
        attention_BS  (B, S) bool: the text tokens that may be attended to; None where no row needs a mask. Every row
                      must allow one token, because softmax over none is NaN
        labels_BKT    (B, K, T) int64 in [0, V), or IGNORED. The loss is computed in here so that no wrapper around
                      this module sees, copies or casts the logits

        Source: audiocraft 1.3.0, T5Conditioner.forward masks after the projection, because of its bias.
        """
        text_BSD = self.enc_to_dec_proj(text_BSD) * text_mask_BS[..., None]
        steps = inputs_BKT.shape[-1]
        # With four axes transformers uses the mask as it is. It would read one with two axes on the host, which waits
        # for the GPU.
        mask = None if attention_BS is None else attention_BS[:, None, None, :].expand(-1, 1, steps, -1)
        hidden_BTD = self.decoder.model(
            input_ids=inputs_BKT.flatten(0, 1),
            encoder_hidden_states=text_BSD,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        heads = self.decoder.lm_heads
        if labels_BKT is None:
            return torch.stack([head(hidden_BTD) for head in heads], dim=1)
        # Head by head: stacking would copy all logits, and their gradient would first be filled with zeros.
        return torch.stack([codebook_cross_entropy(head(hidden_BTD), labels_BKT[:, k]) for k, head in enumerate(heads)])


def empty_language_model(source: Source, *, dropout: float = 0.0) -> LanguageModel:
    """The language model on the meta device, which has shapes and no memory, in training mode.

    dropout  probability in [0, 1) after embeddings and residual blocks. The published configurations say 0.1, and
             audiocraft trains with 0. Dropout of attention and activations, and layer drop, are 0

    Raises ModelError where the source lacks a tensor of it or has one of another shape.
    """
    config = copy.deepcopy(source.config.decoder)
    config.dropout = dropout
    config.attention_dropout = config.activation_dropout = config.layerdrop = 0.0
    with torch.device("meta"):
        model = LanguageModel(
            MusicgenForCausalLM._from_config(config),
            nn.Linear(source.config.text_encoder.hidden_size, config.hidden_size),
        )
    for name, parameter in model.named_parameters():
        if name not in source.weights or source.weights.shape(name) != tuple(parameter.shape):
            raise ModelError(f"{source.name}: its weights do not fit its configuration at {name}")
    return model.train()


def materialize(model: LanguageModel, device: torch.device) -> None:
    """Give a model from the meta device memory on `device`.

    Parameters have any content afterwards. The sinusoidal positions, which are no parameter, are computed here: on the
    CPU, so that every device has the same ones.
    """
    model.to_empty(device=device)
    positions = model.decoder.model.decoder.embed_positions
    with torch.device("cpu"):
        table = positions.get_embedding(positions.num_positions, positions.embedding_dim)
    del positions.weights
    positions.register_buffer("weights", table.to(device), persistent=False)


def load_language_model(source: Source, *, dropout: float = 0.0) -> LanguageModel:
    """The language model in float32 on the CPU, in training mode; see `empty_language_model`."""
    model = empty_language_model(source, dropout=dropout)
    materialize(model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.weights[name])
    return model
