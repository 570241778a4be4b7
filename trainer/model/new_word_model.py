"""The model of --tune_text: T5 and the language model, both frozen, and the embeddings of new tokens, which learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5EncoderModel

from trainer.model.language_model import LanguageModel


class TextTunedModel(LanguageModel):
    """A LanguageModel that reads token ids and computes T5's states of them itself.

    `text_rows` (N, D) float32 is all that is trained: T5's input embeddings of the N tokens from `first_token` on.
    """

    def __init__(self, model: LanguageModel, text_encoder: T5EncoderModel, first_token: int, vectors: int):
        super().__init__(model.decoder, model.enc_to_dec_proj, model.audio_enc_to_dec_proj)
        self.requires_grad_(False)
        width = text_encoder.config.hidden_size
        self.text_rows = nn.Parameter(torch.empty(vectors, width, device=model.enc_to_dec_proj.weight.device))
        self.first_token = first_token
        # In a tuple, where torch does not find it: T5 is no part of this module, and stays whole, float32 and in eval
        # mode, whatever wraps, shards, casts or saves the rest.
        self._outside = (text_encoder.eval().requires_grad_(False),)

    def forward(
        self,
        inputs_BKT: Tensor,
        text_BSD: Tensor,
        text_mask_BS: Tensor,
        attention_BS: Tensor | None = None,
        labels_BKT: Tensor | None = None,
        melody_BC: Tensor | None = None,
    ) -> Tensor:
        """As LanguageModel.forward, but `text_BSD` is (B, S) int64: token ids, any valid one where the mask is 0."""
        states_BSD = self.text_states(text_BSD, attention_BS).to(self.enc_to_dec_proj.weight.dtype)
        return super().forward(inputs_BKT, states_BSD, text_mask_BS, attention_BS, labels_BKT, melody_BC)

    def beside(self, model: LanguageModel) -> TextTunedModel:
        """`model`, which takes texts as this one does: with the same T5 and rows of its own, on the same device as it.

        The rows have any content.
        """
        (encoder,) = self._outside
        return TextTunedModel(model, encoder, self.first_token, len(self.text_rows))

    def text_states(self, tokens_BS: Tensor, attention_BS: Tensor | None) -> Tensor:
        """T5's last hidden states (B, S, D) float32, computed in float32 under autocast too: T5 overflows in float16.

        tokens_BS     (B, S) int64
        attention_BS  (B, S) bool, False for padding; None where no row needs a mask
        """
        (encoder,) = self._outside
        if encoder.device != tokens_BS.device:
            encoder.to(tokens_BS.device)  # once, here: what moves the rest of the model does not know of T5
        is_new_BS = (tokens_BS >= self.first_token) & (tokens_BS < self.first_token + len(self.text_rows))
        with torch.autocast(tokens_BS.device.type, enabled=False):
            # T5's own table is only read and the new rows are a parameter of their own, so that neither gradients nor
            # weight decay can move a known token.
            known_BSD = encoder.get_input_embeddings()(tokens_BS.masked_fill(is_new_BS, 0))
            new_BS = (tokens_BS - self.first_token).masked_fill(~is_new_BS, 0)
            new_BSD = functional.embedding(new_BS, self.text_rows.float())
            embedded_BSD = torch.where(is_new_BS[..., None], new_BSD, known_BSD)
            return encoder(inputs_embeds=embedded_BSD, attention_mask=attention_BS).last_hidden_state
