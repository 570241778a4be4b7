"""How much of its own training clips a run's model reproduces, before and after the training.

python scripts/recall.py --run models

Each clip's caption is given to the model, which generates greedily and without guidance; what is counted are
the codes that equal the clip's. Near 100 % the model has learned its clips by heart: right for a test of the
whole road, and overfitting in anything else. Before the training means: the model that the run started from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from trainer.errors import EXIT_DONE, ConfigError, DataError, TrainerError
    from trainer.flags.config import Config, config_from_dict
except ImportError as missing:
    sys.exit(f"error: {missing}. Install the project (bash scripts/setup.sh) and use its Python: .venv/bin/python")

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import MusicgenForConditionalGeneration

    from trainer.data.dataset import Dataset
    from trainer.model.source import Source


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Codes of one clip that a model was trained on, and how many of them it reproduces, before and after."""

    clip: str
    caption: str
    codes: int
    before: int
    after: int


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    parser = argparse.ArgumentParser(prog="recall.py", description=__doc__, formatter_class=Formatter)
    parser.add_argument("--run", default="models", help="the output_dir of a finished run")
    parser.add_argument("--clips", type=int, default=10, help="at most so many clips, the first by name")
    parser.add_argument("--wav", metavar="FOLDER", help="write each clip's own codes and the generated ones as sound")
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    flags = parser.parse_args(argv)
    try:
        run = Path(flags.run)
        rows = measure(run, most_clips=flags.clips, wav=flags.wav, device_name=flags.device)
        (run / "recall.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
        print(table(rows))
        return EXIT_DONE
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def measure(run: Path, *, most_clips: int, wav: str | None, device_name: str) -> list[Recall]:
    """The recall of the run's first clips by name. Raises TrainerErrors."""
    from trainer.data import dataset
    from trainer.evaluation.generation import device_of, load_for_generation
    from trainer.exports.saved_models import open_saved
    from trainer.model.source import open_model, quiet

    quiet()
    config = config_of(run)
    device = device_of(device_name)
    base, trained = open_model(config.model_id), open_saved(str(run))
    data = dataset.prepare(config, base, device)
    clips = whole_clips(data)[:most_clips]
    true = {clip: codes_of(data, clip) for clip in clips}
    after = generated(trained, data, true, device)
    before = generated(base, data, true, device)
    if wav is not None:
        model = load_for_generation(trained, device)
        write_sounds(Path(wav), model, data, {"0_true": true, "1_before": before, "2_after": after})
    return [
        Recall(
            clip=data.train.names[clip],
            caption=data.train.captions[clip] or "",
            codes=int(trained_cells(true[clip], data.train.segment_frames).sum()),
            before=equal_codes(before[clip], true[clip], data.train.segment_frames),
            after=equal_codes(after[clip], true[clip], data.train.segment_frames),
        )
        for clip in clips
    ]


def config_of(run: Path) -> Config:
    """The flags of the run. Raises ConfigError where the folder holds none."""
    try:
        return config_from_dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {run} is no output_dir of a run: its config.json cannot be read ({error})") from error


def whole_clips(data: Dataset) -> list[int]:
    """Indices, by name, of the clips that fit the segment: longer ones are learned in crops with any start."""
    fitting = [clip for clip in range(data.clips) if data.train.codes.frames[clip, 0] <= data.train.segment_frames]
    if not fitting:
        raise DataError("every clip is longer than --segment_seconds: there is no beginning that was always learned")
    return sorted(fitting, key=lambda clip: data.train.names[clip])


def codes_of(data: Dataset, clip: int) -> Tensor:
    """The clip's cached codes of view 0, (K, T) int64."""
    import torch

    codes = data.train.codes.crop(clip, 0, 0, int(data.train.codes.frames[clip, 0]))
    return torch.from_numpy(codes.astype("int64"))


def trained_cells(codes_KT: Tensor, segment_frames: int) -> Tensor:
    """Bool (K, T): false for the diagonal tail that falls off where the clip fills the segment."""
    import torch

    codebooks, frames = codes_KT.shape
    return torch.arange(frames)[None] < segment_frames - torch.arange(codebooks)[:, None]


def equal_codes(generated_KT: Tensor, true_KT: Tensor, segment_frames: int) -> int:
    """How many trained cells agree."""
    return int(((generated_KT == true_KT) & trained_cells(true_KT, segment_frames)).sum())


def generated(source: Source, data: Dataset, true: dict[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """Greedy codes for each clip's caption, as long as the clip."""
    from tqdm import tqdm

    from trainer.evaluation.generation import Sampling, generate, load_for_generation

    model, tokenizer = load_for_generation(source, device), source.load_tokenizer()
    return {
        clip: generate(
            model,
            tokenizer,
            data.train.captions[clip] or "",
            frames=codes.shape[1],
            sampling=Sampling(guidance=1.0, greedy=True),
        ).codes_KT
        for clip, codes in tqdm(true.items(), desc=f"generating with {source.name}", leave=False)
    }


def table(rows: Sequence[Recall]) -> str:
    """Clip by clip and in all, in per cent."""
    lines = [f"{'clip':<32}{'codes':>8}{'before':>10}{'after':>10}"]
    codes, before, after = (sum(getattr(row, name) for row in rows) for name in ("codes", "before", "after"))
    shown = [(row.clip, row.codes, row.before, row.after) for row in rows] + [("all", codes, before, after)]
    for name, total, first, last in shown:
        lines.append(f"{name[-31:]:<32}{total:>8}{first / total:>10.2%}{last / total:>10.2%}")
    return "\n".join(lines)


def write_sounds(
    folder: Path, model: MusicgenForConditionalGeneration, data: Dataset, versions: dict[str, dict[int, Tensor]]
) -> None:
    """Each clip's codes in each version as NUMBER_CLIP_VERSION.wav, which sort side by side."""
    from trainer.evaluation.generation import decode, write_wav

    folder.mkdir(parents=True, exist_ok=True)
    rate = model.config.audio_encoder.sampling_rate
    for version, codes in versions.items():
        for number, clip in enumerate(codes, start=1):
            stem = Path(data.train.names[clip]).stem
            write_wav(folder / f"{number:02d}_{stem}_{version}.wav", decode(model, codes[clip]), rate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
