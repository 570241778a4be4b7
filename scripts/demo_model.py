"""Make a small model whose codec knows the sound of some clips, so that a demo on them can be heard.

python scripts/demo_model.py --dataset examples --output demo/model
python launch.py --dataset examples --model_id demo/model --code_views 1

The folder is a MusicGen as transformers lays one out: a codec whose codebooks are fitted to these clips, and of the
debug model the decoder, the text encoder and the tokenizer, with random weights. No download is needed.
This codec gives back the clips that it was fitted to, about a minute of music, and no other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import numpy as np

    from trainer.errors import EXIT_DONE, ConfigError, DataError, TrainerError
    from trainer.flags.paths import expanded
    from trainer.flags.script_parser import ScriptParser
    from trainer.run.console import Console
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EncodecModel

    from trainer.data.manifest import Columns
    from trainer.model.source import Source

NAME = "the demo model"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The whole frames of a clip: samples (T x 640,) float32 at 32 kHz, mono."""

    name: str
    samples: Tensor


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    parser = ScriptParser(
        prog="demo_model.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, about in (("--dataset", "the clips, up to 81 s in all"), ("--output", "the model to make")):
        parser.add_argument(name, metavar="FOLDER", type=expanded, required=True, help=about)
    parser.add_argument("--seed", type=int, default=0, help="of the codebooks, 0 or more; default: 0")
    try:
        flags = parser.parse_args(argv)
        if flags.seed < 0:
            raise ConfigError(f"--seed {flags.seed} is below 0: use 0 or more")
        make(Path(flags.dataset), Path(flags.output), seed=flags.seed)
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def make(dataset: Path, output: Path, *, seed: int) -> None:
    """Write the model and say how well its codec knows the clips.

    Raises DataError for clips that it cannot be fitted to, StorageError where the folder cannot be written.
    """
    import torch

    from trainer.exports.export import write_huggingface
    from trainer.model.fitted_codebooks import fit_codebooks
    from trainer.model.language_model import load_language_model
    from trainer.model.passing_codec import latents_of, passing_codec
    from trainer.model.source import quiet_libraries

    quiet_libraries()
    started = time.perf_counter()
    if output.resolve() == dataset.resolve():
        raise ConfigError(f"--output {output} is the folder of the clips: give another one")
    clips = read_clips(dataset)
    codec = passing_codec()
    fit_codebooks(codec, torch.cat([latents_of(clip.samples) for clip in clips]), seed=seed)
    codec.config.fitted_clips = len(clips)  # so that the page of a run can say what its sounds are
    fitted = time.perf_counter()
    ratios = [snr_of(codec, clip.samples) for clip in clips]
    source = with_codec(codec)
    weights = load_language_model(source).state_dict()
    write_huggingface(source, weights, output, card(clips, seed))
    frames = sum(len(clip.samples) for clip in clips) // source.frame_samples
    number = f"{len(clips)} clip{'s' * (len(clips) > 1)}"
    print(f"{output}: a model whose codec is fitted to {number}, {frames:,} frames of 20 ms")
    print(f"({fitted - started:.1f} s for reading and fitting, {time.perf_counter() - fitted:.1f} s for the rest)")
    print("How exactly its codes give each clip back, signal to noise in dB (60 cannot be told from the clip by ear):")
    for clip, ratio in zip(clips, ratios, strict=True):
        print(f"  {clip.name:<40}{ratio:>8.1f}")


def read_clips(dataset: Path) -> list[Clip]:
    """The clips of a folder by name, read as a training reads them, but with or without captions.

    Raises DataError where there are none, where one cannot be read or is too loud for the codec, and where they are too
    long in all.
    """
    import torch

    from trainer.data import manifest
    from trainer.data.caption_settings import CaptionSettings
    from trainer.data.prepared import is_prepared
    from trainer.model.fitted_codebooks import MOST_LATENTS
    from trainer.model.passing_codec import FRAME_SAMPLES, HEADROOM, SAMPLE_RATE_HZ

    if is_prepared(dataset):
        raise DataError(f"{dataset} is a prepared folder, which holds no sounds: give the music itself")
    with tempfile.TemporaryDirectory() as facts:
        found = manifest.scan(
            dataset, min_seconds=FRAME_SAMPLES / SAMPLE_RATE_HZ, facts_folder=Path(facts), show_progress=False,
            captions=CaptionSettings(no_label=True),
        ).columns
    most_seconds = MOST_LATENTS * FRAME_SAMPLES / SAMPLE_RATE_HZ
    seconds = sum(found["seconds"])
    if seconds > most_seconds:
        raise DataError(
            f"{dataset} holds {seconds:.1f} s of music, and the codebooks fit {MOST_LATENTS:,} frames of 20 ms,"
            f" {most_seconds:.1f} s: give fewer or shorter clips"
        )
    clips = []
    for row in sorted(range(len(found["path"])), key=lambda row: str(found["path"][row])):
        name, samples = found["path"][row], samples_of(found, row, SAMPLE_RATE_HZ)
        if samples.min() <= -HEADROOM:
            raise DataError(f"{name}: its peak is {-samples.min():.1f} of full scale: turn it down below {HEADROOM:g}")
        samples = samples[: len(samples) // FRAME_SAMPLES * FRAME_SAMPLES]
        clips.append(Clip(name=name, samples=torch.from_numpy(samples)))
    return clips


def samples_of(clips: Columns, row: int, sample_rate_hz: int) -> np.ndarray:
    """The samples of a clip as they are encoded, (n,) float32 mono. Raises DataError where they cannot be read."""
    from trainer.data.audio_fault import AudioFault
    from trainer.data.cache import sound_blocks
    from trainer.data.excerpt import Excerpt

    excerpt = Excerpt(**{name: clips[name][row] for name in ("first_frame", "frames", "gain")})
    try:
        blocks = sound_blocks(clips["path_bytes"][row], clips["content"][row], sample_rate_hz, excerpt)
        return np.concatenate(list(blocks))
    except AudioFault as fault:
        raise DataError(f"{clips['path'][row]} cannot be read ({fault})") from fault


def snr_of(codec: EncodecModel, samples: Tensor) -> float:
    """The signal to noise in dB of samples (T x 640,) float32 that went through the codec whole; see `snr_db`."""
    import torch

    from trainer.evaluation.recall import snr_db

    with torch.inference_mode():
        codes = codec.encode(samples[None, None]).audio_codes
        decoded = codec.decode(codes, [None]).audio_values[0, 0]
    return snr_db(samples.numpy(), decoded.numpy())


def with_codec(codec: EncodecModel) -> Source:
    """The debug model with another codec."""
    from trainer.model.debug_model import build_debug_model
    from trainer.model.source import source_of

    model = build_debug_model()
    model.audio_encoder, model.config.audio_encoder = codec, codec.config
    return source_of(model, name=NAME)


def card(clips: Sequence[Clip], seed: int) -> str:
    """README.md of the folder."""
    names = "\n".join(f"- {clip.name}" for clip in clips)
    return f"""# A MusicGen for a demo

Made by scripts/demo_model.py (seed {seed}). It has the layout and the classes of a MusicGen of transformers
(`MusicgenForConditionalGeneration`), and none of Meta's weights.

**Its codec knows the clips below and no other music.** EnCodec's convolutions pass sound through, and its four
codebooks are fitted to the frames of these clips, which it gives back so exactly that no ear can tell. Of any other
sound each frame becomes the nearest rows, so that what comes back is mostly a patchwork of these clips with noise.

Text encoder and decoder have random weights: untrained, the model makes noise. Trained on these clips, it can learn to
play them back from their captions, and nothing else. What it learns says nothing about how well music is learned by
the published models.

{names}
"""


if __name__ == "__main__":
    with Console():  # what libraries warn of when they are loaded is no news here
        sys.exit(main(sys.argv[1:]))
