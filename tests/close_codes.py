"""How far greedy codes of two programs must be equal: until two codes are so close that rounding decides."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.model.delay_pattern import delay, inputs_and_labels
from trainer.model.language_model import LanguageModel

SPECIAL = 2048


@torch.no_grad()
def equal_steps(
    model: LanguageModel, text_BSD: Tensor, codes_BKT: Tensor, their_BKT: Tensor, *, guidance: float, close: float
) -> list[int]:
    """Of each sound, how many steps were compared, and found equal: those before the first with a gap below `close`.

    codes_BKT  (B, K, T), of a text model's texts text_BSD. They must be the likeliest ones by their own logits, which
               are computed in one pass over them, without a cache
    """
    device = model.enc_to_dec_proj.weight.device
    channels, frames = model.decoder.config.audio_channels, codes_BKT.shape[-1]
    compared = []
    for text_SD, codes_KT, their_KT in zip(text_BSD, codes_BKT, their_BKT, strict=True):
        inputs_1KT, _ = inputs_and_labels(codes_KT[None], SPECIAL, channels)
        text_2SD, mask_2S = torch.stack([text_SD, torch.zeros_like(text_SD)]), torch.ones(2, len(text_SD))
        mask_2S[1] = 0
        logits_KTV, null_KTV = model(
            inputs_1KT.expand(2, -1, -1).to(device), text_2SD.to(device), mask_2S.to(device)
        ).float()
        best = (null_KTV + guidance * (logits_KTV - null_KTV)).topk(2, dim=-1)
        made_KT, theirs_KT = (delay(one[None].cpu(), SPECIAL, channels)[0] for one in (codes_KT, their_KT))
        gaps_KT = (best.values[..., 0] - best.values[..., 1]).cpu().where(made_KT != SPECIAL, torch.inf)
        clear_KT = gaps_KT.isfinite() & (gaps_KT > close)
        assert torch.equal(best.indices[..., 0].cpu().where(clear_KT, made_KT), made_KT), "not the likeliest codes"
        ties = (gaps_KT <= close).any(0).nonzero()
        steps = int(ties[0]) if len(ties) else frames
        assert torch.equal(made_KT[:, :steps], theirs_KT[:, :steps])
        compared.append(steps)
    return compared
