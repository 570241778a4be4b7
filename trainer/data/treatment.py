"""What of a sound is encoded, and how loud: silence at both ends left out, a gain to one loudness. Off by default.

Both are applied to the decoded samples of each channel, at the file's own rate, before they are mixed to mono and
resampled. So the codes are those of a file that was cut and amplified beforehand. There is no fade: the sound is cut
where it is below -60 dBFS in every channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.audio import AudioFacts
from trainer.data.excerpt import Excerpt

SAID_SECONDS = 0.01  # less silence than that is left out without a remark


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to every sound before it is encoded.

    trim_silence   whether what lies before the first and after the last sample of -60 dBFS or more is left out
    loudness_lufs  the integrated loudness (ITU-R BS.1770-4, of the whole file with all its channels) that each file is
                   brought to; None: each keeps its own
    """

    trim_silence: bool = False
    loudness_lufs: float | None = None

    @property
    def key(self) -> str:
        """What tells codes of sounds that were treated so from others, as part of a file name; "" where all is off."""
        trim = "-trim" if self.trim_silence else ""
        # All digits, without the ".0" of a whole number; the minus sign parts it from what stands before it.
        return trim if self.loudness_lufs is None else f"{trim}{str(self.loudness_lufs).removesuffix('.0')}LUFS"

    def excerpt_of(self, facts: AudioFacts) -> tuple[Excerpt, str]:
        """What of a sound is encoded, and a remark on it for the report, or ""."""
        rate, levels = facts.sample_rate_hz, facts.levels
        first, frames, remarks = 0, round(facts.seconds * rate), []
        if self.trim_silence:
            first = round(levels.lead_seconds * rate)
            tail = round(levels.tail_seconds * rate)
            frames -= first + tail
            if first + tail >= SAID_SECONDS * rate:
                remarks.append(f"silence left out: {first / rate:.2f} s at the start, {tail / rate:.2f} s at the end")
        gain, loudness_remark = self._gain(levels.loudness_lufs, levels.peak)
        remark = "; ".join(filter(None, (*remarks, loudness_remark)))
        return Excerpt(first_frame=first, frames=frames, gain=gain), remark

    def _gain(self, found_lufs: float | None, peak: float) -> tuple[float, str]:
        """What the samples are multiplied by, a float32, and a remark where the loudness is not reached or ""."""
        if self.loudness_lufs is None:
            return 1.0, ""
        if found_lufs is None:
            return 1.0, "too short or too quiet to have a loudness: used as loud as it is"
        wanted = np.float32(10 ** ((self.loudness_lufs - found_lufs) / 20))
        if wanted * np.float32(peak) <= 1:
            return float(wanted), ""
        most = np.float32(1 / peak)
        if most * np.float32(peak) > 1:
            most = np.nextafter(most, np.float32(0))
        reached = found_lufs + 20 * np.log10(float(most))
        return float(most), (
            f"brought to {reached:.1f} LUFS, not {self.loudness_lufs:g}: its peak is then at full scale"
        )


AS_IT_IS = Treatment()
