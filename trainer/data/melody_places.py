"""A melody as a model reads it: a note for each of the places in front of the text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainer.spec.shapes import MELODY_PLACES


def melody_places(notes: np.ndarray) -> Tensor | None:
    """The notes (C,) int64 in [0, 12) of C = MELODY_PLACES places; None for no notes.

    notes  (n,) integers in [0, 12), one for every 4096 samples: repeated where they are too few, cut where too many

    Source: audiocraft 1.3.0, ChromaStemConditioner with match_len_on_eval.
    """
    return torch.from_numpy(np.resize(notes, MELODY_PLACES).astype(np.int64)) if len(notes) else None
