"""Sound from the codes of one channel, of any length, in as much memory as half a minute needs.

EnCodec's decoder is a convolution, an LSTM over all frames, and convolutions that make 640 samples of each frame. These
last hold 64 channels at 32 kHz: of ten minutes decoded in one pass that is 4.9 GB for a single one of several copies.
So they run over pieces with some frames on both sides, which hold all that an output depends on. The LSTM runs over
pieces too, and hands its state from one to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecLSTM

from trainer.data.codec_windows import reproducible
from trainer.errors import ModelError

PIECE_FRAMES = 1500
# Frames of a piece's neighbours that are computed with it. MusicGen's first convolution sees 3 on each side, and what
# follows the LSTM less than 2.
CONTEXT_FRAMES = 8


@torch.no_grad()
def decode_channel(codec: EncodecModel, codes_KT: Tensor, piece_frames: int = PIECE_FRAMES) -> Tensor:
    """The sound (T x samples per frame,) float32 of codes (K, T) int64, on the CPU.

    piece_frames  up to which codes are decoded in one pass, as `codec.decode` does it; longer ones equal that pass too,
                  but for the rounding of convolutions, which depends on the length of what they are given

    Runs on the codec's device. Raises ModelError for an EnCodec that cannot be cut into pieces.
    """
    with reproducible(codec.device):
        codes_KT = codes_KT.to(codec.device, torch.int64)
        if codes_KT.shape[1] <= piece_frames:
            return codec.decode(codes_KT[None, None], audio_scales=[None]).audio_values[0, 0].float().cpu()
        first, lstm, *rest = codec.decoder.layers
        if not isinstance(lstm, EncodecLSTM) or codec.config.norm_type != "weight_norm" or codec.config.chunk_length:
            raise ModelError(
                f"this EnCodec cannot decode more than {piece_frames} frames, because it normalises over time, works in"
                " chunks, or has other layers than MusicGen's (facebook/encodec_32khz): make shorter sounds"
            )
        remembered_1DT = _remembered(codec, first, lstm, codes_KT, piece_frames)
        upsample = torch.nn.Sequential(*rest)
        hop, length = codec.config.hop_length, codes_KT.shape[1]
        pieces = []
        for begin in range(0, length, piece_frames):
            end, lead = min(begin + piece_frames, length), min(begin, CONTEXT_FRAMES)
            sound_11L = upsample(remembered_1DT[..., begin - lead : end + CONTEXT_FRAMES])
            pieces.append(sound_11L[0, 0, lead * hop : (lead + end - begin) * hop].float().cpu())
        return torch.cat(pieces)


def _remembered(
    codec: EncodecModel, first: torch.nn.Module, lstm: EncodecLSTM, codes_KT: Tensor, piece_frames: int
) -> Tensor:
    """What the decoder's LSTM makes of the codes, (1, D, T): 4 KB a frame of MusicGen's, 0.74 GB an hour."""
    state, pieces = None, []
    length = codes_KT.shape[1]
    for begin in range(0, length, piece_frames):
        end, lead = min(begin + piece_frames, length), min(begin, CONTEXT_FRAMES)
        embedded_1DT = codec.quantizer.decode(codes_KT[:, None, begin - lead : end + CONTEXT_FRAMES])
        features_T1D = first(embedded_1DT)[..., lead : lead + end - begin].permute(2, 0, 1)
        outputs_T1D, state = lstm.lstm(features_T1D, state)
        pieces.append((outputs_T1D + features_T1D).permute(1, 2, 0))
    return torch.cat(pieces, dim=-1)
