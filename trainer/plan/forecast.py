"""How long a run takes and what it puts onto disk, from a step's seconds and the numbers of its order: arithmetic.

docs/time.md says what is measured of it and what assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.plan.layout import FLOAT32, Workload
from trainer.plan.memory import checkpoint_bytes
from trainer.plan.time import StepTime
from trainer.spec.shapes import MELODY_PLACES, MELODY_SECONDS, Shape
from trainer.spec.trainable import count

CODE_BYTES = 2  # of a code in the cache, int16
ROW_BYTES = 128  # what the cache keeps of a clip, caption or melody besides, as trainer/data/cache.py reckons
MELODY_NOTES_HZ = MELODY_PLACES / MELODY_SECONDS  # a byte each in the cache, once for all views
# Complete checkpoints that stay (KEPT of trainer/run/checkpoint.py), and the one that is being written.
NEWEST, WRITTEN = 2, 1


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What there is to do, as far as time depends on it.

    left       optimizer steps that are left of the run
    per_epoch  steps of an epoch; no whole number where a step spans two
    share      FLOPs that an average step computes, padding included, of those of a full one. A full one has as many
               clips of full length as the layout takes; clips that are shorter than the segment make it cheaper
    early_stop whether validations may end the run before
    """

    left: int
    per_epoch: float
    share: float = 1.0
    early_stop: bool = False


def step_seconds(time: StepTime, share: float) -> float:
    """Seconds of a step that computes this share of what a full one does.

    Forward and backward shrink with it, down to what the host needs for them. The update does not, since it is of
    weights, and neither does what is sent: what was sent beside the computation, and no longer finds room there, is
    waited for.
    """
    beside = time.communication - time.exposed
    compute = max(share * time.compute, min(time.least_compute, time.compute))
    return compute + time.update + time.exposed + max(0.0, 1 - share) * beside


def time_in_words(time: StepTime | None, steps: Steps) -> str:
    """The seconds of a step, of an epoch and of what is left of the run, as one line."""
    left, of_epoch = f"{steps.left:,} steps", f"{_count(steps.per_epoch)} steps an epoch"
    most = "at most " if steps.early_stop else ""
    if time is None:
        return f"{of_epoch}, {most}{left} to do"
    each = step_seconds(time, steps.share)
    return (
        f"{seconds_in_words(each)} a step, {of_epoch} ({seconds_in_words(each * steps.per_epoch)}),"
        f" {most}{left} to do: {seconds_in_words(each * steps.left)}; validations, sounds and the export come on top"
    )


def seconds_in_words(seconds: float) -> str:
    """0.052 s, 0.52 s, 5.2 s, 52 s, 12 min, 2 h 05 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def bytes_in_words(count_of_bytes: float) -> str:
    """0.3 MB, 12 MB, 1.2 GB, 22 GB, 1.5 TB."""
    megabytes = count_of_bytes / 1e6
    for unit in ("MB", "GB"):
        if megabytes < 999.5:
            return f"{megabytes:.0f} {unit}" if megabytes >= 9.95 else f"{megabytes:.1f} {unit}"
        megabytes /= 1000
    return f"{megabytes:.3g} TB"


@dataclass(frozen=True, kw_only=True)
class Clips:
    """What the cache holds of a data set.

    clips    how many, those to validate on included
    seconds  of all of them together
    views    at which each is encoded (--code_views)
    texts    different captions, with their variants; tokens of all of them together
    """

    clips: int
    seconds: float
    views: int
    frame_rate_hz: float
    texts: int = 0
    tokens: int = 0


def cache_bytes(shape: Shape, clips: Clips) -> int:
    """Bytes of codes, text states and melodies in the cache: 1.44 MB an hour and view at 4 codebooks, twice that in
    stereo; T5's states in float32; notes in a byte each."""
    codes = CODE_BYTES * shape.codebooks * clips.views * clips.seconds * clips.frame_rate_hz
    states = FLOAT32 * shape.text_width * clips.tokens
    notes = MELODY_NOTES_HZ * clips.seconds + ROW_BYTES * clips.clips if shape.melody else 0
    return round(codes + states + notes + ROW_BYTES * (clips.clips + clips.texts))


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes that a run puts onto disk.

    cache        of its clips, whether they are there already or not
    checkpoint   one of them; checkpoints: how many are there at once, at most
    exports      what the end writes, by name
    step_file    each lm_<step>.pt; step_files: how many of them are still to be written
    sounds       of --sample_every, still to be made
    """

    cache: int
    checkpoint: int
    checkpoints: int
    exports: Mapping[str, int] = field(default_factory=dict)
    step_file: int = 0
    step_files: int = 0
    sounds: int = 0

    def in_words(self) -> str:
        """What goes into output_dir, as part of a line."""
        parts = [f"checkpoints {self.checkpoints} x {bytes_in_words(self.checkpoint)}"]
        parts.append(f"exports {bytes_in_words(sum(self.exports.values()))}")
        if self.step_files:
            parts.append(f"--save_step {self.step_files} x {bytes_in_words(self.step_file)}")
        if self.sounds:
            parts.append(f"sounds {bytes_in_words(self.sounds)}")
        return ", ".join(parts)

    def still_needed(self, there: Mapping[str, int]) -> int:
        """The most that output_dir will take more than it does now.

        there  bytes by name of what lies there: checkpoints, and each of `exports`. New files take the place of those
               of the same name, and each is whole before its former one goes
        """
        held = max(0, self.checkpoints * self.checkpoint - there.get("checkpoints", 0))
        held += self.step_files * self.step_file + self.sounds
        most = now = 0
        for name, size in self.exports.items():
            most = max(most, now + size)
            now += size - there.get(name, 0)
        return held + max(most, now, 0)


def export_bytes(shape: Shape, workload: Workload, *, own_text_encoder: bool) -> dict[str, int]:
    """Bytes of what the end of a run writes, by name: everything in float32, and whole also where a part was trained.

    own_text_encoder  whether T5 is none that audiocraft finds on the hub, so that it lies in audiocraft/ as well
    """
    selection = workload.selection
    counts = count(shape, selection)
    codec = shape.frozen - shape.text_encoder
    whole = FLOAT32 * (shape.parameters + shape.frozen)
    if selection.new_rows:
        return {"text_embedding.safetensors": FLOAT32 * counts.trained, "huggingface": whole}
    text_encoder = shape.text_encoder if own_text_encoder else 0
    made = {
        "lm_final.pt": FLOAT32 * shape.parameters,
        "huggingface": whole,
        "audiocraft": FLOAT32 * (shape.parameters + codec + text_encoder),
    }
    return made if selection.lora is None else made | {"adapter": FLOAT32 * counts.trained}


def disk_of(
    shape: Shape, workload: Workload, clips: Clips | None, *, keep_best: bool, own_text_encoder: bool,
    step_files: int = 0, sounds: int = 0,
) -> Disk:
    """What a run puts onto disk.

    clips       None where nothing is known of them, or where they are in no cache
    step_files  how many steps of --save_step are left; sounds: bytes of those that are left
    """
    exports = export_bytes(shape, workload, own_text_encoder=own_text_encoder)
    return Disk(
        cache=0 if clips is None else cache_bytes(shape, clips),
        checkpoint=checkpoint_bytes(shape, workload),
        checkpoints=NEWEST + WRITTEN + keep_best,
        exports=exports,
        step_file=exports.get("lm_final.pt") or exports["text_embedding.safetensors"],
        step_files=step_files,
        sounds=sounds,
    )


def _count(steps: float) -> str:
    return f"{round(steps):,}" if steps >= 10 or steps == round(steps) else f"{steps:.1f}"
