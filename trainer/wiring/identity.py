"""From the flags to the identity of a run: what must be the same for a checkpoint to be continued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.spec.caption_sources import SOURCES
from trainer.wiring.data import caption_settings

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.flags.config import Config
    from trainer.model.source import Source

STEMS = "stems of melodies (--stems)"


def identity_of(config: Config, source: Source, data: Dataset) -> dict[str, object]:
    """What must be the same for a checkpoint to be continued: the numbers depend on all of it.

    Settings that are off have no entry, so that checkpoints from before they existed can be continued. What only
    decides how a step is computed has none either: GPUs, strategy, and the rates of links (--link_gbps) by which the
    plan may take another strategy. Losses and norms are the same under each.
    """
    identity: dict[str, object] = {
        "dataset": f"{data.clips} clips, digest {data.digest}",
        "codec": source.codec_identity(),
        "text encoder": source.text_identity(),
        "decoder": source.decoder_shape(),
        "--seed": config.seed,
        "--segment_seconds": config.segment_seconds,
        "--code_views": config.code_views,
        "share of captions dropped (--use_cfg, --cfg_rate)": config.caption_drop_rate,
    }
    if config.trim_silence:
        identity["--trim_silence"] = 1
    if config.loudness is not None:
        identity["--loudness"] = config.loudness
    if config.sample_by != "file":
        identity["--sample_by"] = config.sample_by
    if config.init_from is not None:
        identity["--init_from"] = config.init_from
    if config.ema_decay is not None:
        identity["--ema_decay"] = config.ema_decay
    if config.word_dropout > 0:
        rate, variants = config.word_dropout, config.caption_variants
        identity["words dropped (--word_dropout, --caption_variants)"] = f"{rate} in {variants} variants"
    if (trigger := config.caption_trigger) is not None:
        identity["--trigger, --trigger_place"] = f'"{trigger.text}" {trigger.place} each caption'
    identity.update(identity_of_captions(config))
    if config.stereo:
        identity["--stereo, --stereo_init"] = f"stereo, with embeddings {config.stereo_init}"
    if source.melody:
        identity["share of melodies dropped (--melody_rate)"] = config.melody_drop_rate
        identity[STEMS] = data.stems
    if not config.selection.everything:
        identity["trained"] = config.selection.describe()
        identity["frozen weights"] = source.probe()
    if config.tune_text:
        identity["--placeholder, --init_word"] = f"{config.placeholder} from {config.init_word}"
    return identity


def identity_of_captions(config: Config) -> dict[str, object]:
    """Where captions come from, as far as it is stated. The digest of the data set holds the captions that are trained
    on; those of the clips that validate are in no digest, and what is drawn of merged captions is in none either."""
    names = ("caption_column", "caption_template", "default_caption", "caption")
    identity: dict[str, object] = {f"--{name}": value for name in names if (value := getattr(config, name)) is not None}
    if config.caption_sources != SOURCES:
        identity["--captions"] = ",".join(config.caption_sources)
    merge = caption_settings(config).merge
    if merge.on:
        flags = "--merge_metadata, --merge_drop_caption, --merge_drop_field, --caption_variants"
        identity[f"metadata merged into captions ({flags})"] = f"{merge.describe()}, {config.caption_variants} variants"
    return identity
