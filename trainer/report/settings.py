"""What the report of a dataset must know besides its folders."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.caption_settings import CaptionSettings
from trainer.data.manifest import PLAIN
from trainer.data.treatment import AS_IT_IS, Treatment


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of the run that the report describes.

    validation_share  of the first folder's clips, chosen as the run chooses them by `seed`
    captions          where captions come from
    treatment         what is done to each sound before it is encoded
    segment_seconds   length of a training crop
    model             --model_id, whose tokenizer says which words T5 knows
    embed             whether short excerpts of the sounds are put into the page
    """

    validation_share: float = 0.0
    seed: int = 0
    captions: CaptionSettings = PLAIN
    treatment: Treatment = AS_IT_IS
    segment_seconds: float = 30.0
    model: str = "small"
    embed: bool = False
