"""MusicGen's trained part, under the key names that `MusicgenForConditionalGeneration` gives its tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM

from trainer.errors import ModelError
from trainer.model.loss import codebook_cross_entropy
from trainer.model.source import Source


class LanguageModel(nn.Module):
    """MusicGen's trained part: codes and text states in, logits of the next codes out."""

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
        """Logits (B, K, T, V) of each step's codes; given labels, the summed cross entropy (K,) instead.

        inputs_BKT    int64 in [0, V]: the delayed codes, one step late; V is the special token
        text_BSD      float32: T5's last hidden states, any value where the mask is 0
        text_mask_BS  float32, 1 for a text token; a row of zeros is a null condition, whose keys and
                      values become exactly 0, and with them its cross-attention
        attention_BS  bool, the tokens that may be attended to; None where rows need no mask. Every row
                      must allow one token: softmax over none is NaN
        labels_BKT    int64 in [0, V), or IGNORED. The loss is computed in here so that no wrapper around
                      this module sees, copies or casts the logits

        Source: audiocraft 1.3.0, T5Conditioner.forward masks after the projection, because of its bias.
        """
        text_BSD = self.enc_to_dec_proj(text_BSD) * text_mask_BS[..., None]
        steps = inputs_BKT.shape[-1]
        # Four axes: transformers then uses the mask as it is, without reading it on the host.
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
        # Head by head: stacked logits would be copied once more here, and filled with zeros in the backward pass.
        return torch.stack([codebook_cross_entropy(head(hidden_BTD), labels_BKT[:, k]) for k, head in enumerate(heads)])


def empty_language_model(source: Source, *, dropout: float = 0.0) -> LanguageModel:
    """The trained part on the meta device, in training mode: shapes, no memory.

    dropout  probability in [0, 1) after embeddings and residual blocks; the published configs say 0.1,
             audiocraft trains with 0. Other dropouts and layer drop are 0.
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
    """Give a model from the meta device memory of any content, and its table of positions."""
    model.to_empty(device=device)
    positions = model.decoder.model.decoder.embed_positions
    with torch.device("cpu"):
        table = positions.get_embedding(positions.num_positions, positions.embedding_dim)
    del positions.weights
    positions.register_buffer("weights", table.to(device), persistent=False)


def load_language_model(source: Source, *, dropout: float = 0.0) -> LanguageModel:
    """The trained part in float32 on the CPU, in training mode; see `empty_language_model`."""
    model = empty_language_model(source, dropout=dropout)
    materialize(model, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.weights[name])
    return model
