"""MusicGen's language model: the decoder and the projections of its conditions, which is what a run trains and saves.

Its tensors have the names that they have in transformers' `MusicgenForConditionalGeneration`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM, MusicgenMelodyForCausalLM

from trainer.errors import ModelError
from trainer.model.loss import codebook_cross_entropy
from trainer.model.positions import look_up_on_device
from trainer.model.source import Source


class LanguageModel(nn.Module):
    """Codes, text states and in melody models a melody in, logits of the next codes out, or their cross entropy.

    A text model attends to the text (cross-attention). A melody model has instead a row of melody, text and codes, of
    which each place sees those before it; then there is `audio_enc_to_dec_proj`.
    """

    def __init__(
        self,
        decoder: MusicgenForCausalLM | MusicgenMelodyForCausalLM,
        enc_to_dec_proj: nn.Linear,
        audio_enc_to_dec_proj: nn.Linear | None = None,
    ):
        super().__init__()
        self.decoder = decoder
        self.enc_to_dec_proj = enc_to_dec_proj
        self.audio_enc_to_dec_proj = audio_enc_to_dec_proj

    def forward(
        self,
        inputs_BKT: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor,
        attention_BS: Tensor | None = None,
        labels_BKT: Tensor | None = None,
        melody_BC: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, T, V) of each step's codes; where labels are given, the summed cross entropy (K,) instead.

        inputs_BKT    (B, K, T) int64 in [0, V]: the delayed codes, one step late; V is the special token
        text_BSD      (B, S, D) float32: T5's last hidden states, any value where the mask is 0
        text_mask_BS  (B, S) float32: 1 for a text token, 0 for padding. A row of zeros is a null condition: its keys
                      and values become exactly 0, and with them what cross-attention adds
        attention_BS  (B, S) bool: the text tokens that may be attended to; None where no row needs a mask. Every row
                      must allow one token, because softmax over none is NaN. In a melody model: the text tokens that
                      are in the row, from the first on; None where all are in all rows
        labels_BKT    (B, K, T) int64 in [0, V), or IGNORED. The loss is computed in here so that no wrapper around
                      this module sees, copies or casts the logits
        melody_BC     (B, C) int64 in [0, 12): the note that sounds at each of C places in front of the text, 0 at all
                      of them where there is no melody; None in a text model

        Source: audiocraft 1.3.0, T5Conditioner.forward masks after the projection, because of its bias.
        """
        text_BSD = self.enc_to_dec_proj(text_BSD) * text_mask_BS[..., None]
        if melody_BC is None:
            hidden_BTD = self._attending(inputs_BKT, text_BSD, attention_BS)
        else:
            hidden_BTD = self._behind_prefix(inputs_BKT, text_BSD, attention_BS, melody_BC)
        heads = self.decoder.lm_heads
        if labels_BKT is None:
            return torch.stack([head(hidden_BTD) for head in heads], dim=1)
        # Head by head: stacking would copy all logits, and their gradient would first be filled with zeros.
        return torch.stack([codebook_cross_entropy(head(hidden_BTD), labels_BKT[:, k]) for k, head in enumerate(heads)])

    def _attending(self, inputs_BKT: Tensor, text_BSD: Tensor, attention_BS: Tensor | None) -> Tensor:
        """The last hidden states (B, T, D) of a text model; `text_BSD` is the projected text."""
        steps = inputs_BKT.shape[-1]
        # With four axes transformers uses the mask as it is. It would read one with two axes on the host, which waits
        # for the GPU.
        mask = None if attention_BS is None else attention_BS[:, None, None, :].expand(-1, 1, steps, -1)
        return self.decoder.model(
            input_ids=inputs_BKT.flatten(0, 1),
            encoder_hidden_states=text_BSD,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state

    def _behind_prefix(
        self, inputs_BKT: Tensor, text_BSD: Tensor, attention_BS: Tensor | None, melody_BC: Tensor
    ) -> Tensor:
        """The last hidden states (B, T, D) at the codes of a melody model; `text_BSD` is the projected text.

        A row is its melody, its own text, its codes, and behind them what other rows have more. So it has the places
        that it has alone, no mask is needed, and it does not depend on its batch-mates. transformers' own forward pads
        in front of the codes, which moves them.
        """
        melody_BCD, codes_BTD = self.melody_states(melody_BC), self._embedded(inputs_BKT)
        rows_BPD = torch.cat([melody_BCD, text_BSD, codes_BTD], dim=1)
        first, steps = melody_BC.shape[1] + text_BSD.shape[1], codes_BTD.shape[1]
        if attention_BS is None:
            return self.decoder.model.decoder(inputs_embeds=rows_BPD, use_cache=False).last_hidden_state[:, first:]
        device = rows_BPD.device
        first_B1 = melody_BC.shape[1] + attention_BS.sum(dim=1, keepdim=True)  # where a row's codes begin
        places_P = torch.arange(rows_BPD.shape[1], device=device)
        # Behind a row's text stand its codes; what lies beyond them are copies of the last place, which nobody reads.
        sources_BP = torch.where(places_P < first_B1, places_P, places_P + first - first_B1)
        sources_BP = sources_BP.clamp(max=first + steps - 1)
        hidden_BPD = self.decoder.model.decoder(inputs_embeds=_gathered(rows_BPD, sources_BP), use_cache=False)
        return _gathered(hidden_BPD.last_hidden_state, first_B1 + torch.arange(steps, device=device))

    def melody_states(self, melody_BC: Tensor) -> Tensor:
        """The projected melody (B, C, D) of notes (B, C) int64 in [0, 12)."""
        projection = self.audio_enc_to_dec_proj
        assert projection is not None, "a text model reads no melody"
        # Not by functional.one_hot, which on some devices waits for the largest of the notes, to check it.
        notes = torch.arange(projection.in_features, device=melody_BC.device)
        return projection((melody_BC[..., None] == notes).to(projection.weight.dtype))

    def _embedded(self, inputs_BKT: Tensor) -> Tensor:
        """The sum (B, T, D) of the codebooks' embeddings, added in the order in which transformers adds them."""
        first, *others = self.decoder.model.decoder.embed_tokens
        embedded = first(inputs_BKT[:, 0])
        for k, table in enumerate(others, 1):
            embedded = embedded + table(inputs_BKT[:, k])
        return embedded


def _gathered(values_BPD: Tensor, places_BQ: Tensor) -> Tensor:
    """(B, Q, D): of each row the values at these of its places."""
    return values_BPD.gather(1, places_BQ[..., None].expand(-1, -1, values_BPD.shape[-1]))


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
            (MusicgenMelodyForCausalLM if source.melody else MusicgenForCausalLM)._from_config(config),
            nn.Linear(source.config.text_encoder.hidden_size, config.hidden_size),
            nn.Linear(source.config.num_chroma, config.hidden_size) if source.melody else None,
        )
    look_up_on_device(model.decoder.model.decoder)
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
