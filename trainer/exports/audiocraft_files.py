"""The files of audiocraft: their names, and the language model or the EnCodec that one of them holds.

Nothing in a file is executed (see trainer/exports/pickled.py), and its tensors stay on disk until they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import EncodecConfig

from trainer.errors import ModelError
from trainer.exports.audiocraft_config import CONFIG, AudiocraftConfig, read_codec_config, read_lm_config
from trainer.exports.audiocraft_names import codec_from_audiocraft, lm_from_audiocraft, require_window
from trainer.exports.pickled import load_pickled
from trainer.model.source import MELODY_PROJECTION

LM_FILE, CODEC_FILE, SOLVER_FILE = "state_dict.bin", "compression_state_dict.bin", "checkpoint.th"
STATE, FSDP_STATE = "best_state", "fsdp_best_state"  # the entries of a file that hold tensors by name


@dataclass(frozen=True, kw_only=True)
class AudiocraftModel:
    """A language model from audiocraft's files.

    state   tensors by our names (see trainer/exports/audiocraft_names.py), on the CPU
    config  None where the file holds tensors alone, as an lm_final.pt does
    """

    state: dict[str, Tensor]
    config: AudiocraftConfig | None


def read_audiocraft(path: Path) -> AudiocraftModel:
    """The language model in `path`: a folder with state_dict.bin, such a file, an lm_*.pt, or a solver's checkpoint.th.

    Of a solver's checkpoint it is the best state, FSDP's first, as audiocraft 1.3.0's utils/export.py takes it.
    Raises ModelError where the file is missing, truncated or holds something else.
    """
    file = path / LM_FILE if path.is_dir() else path
    package = load_pickled(file)
    state = package.get(FSDP_STATE) or package.get(STATE, package)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # a solver's: by the name of each module
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{file} holds no language model of audiocraft, whose tensors stand under {STATE}")
    try:
        require_window(state)
        state = lm_from_audiocraft(state)
    except ModelError as error:
        raise ModelError(f"{file} holds no text-to-music model of audiocraft: {error}") from error
    config = read_lm_config(package[CONFIG], file) if CONFIG in package else None
    if config is not None and config.melody != (MELODY_PROJECTION + "weight" in state):
        raise ModelError(f"{file}: its {CONFIG} and its tensors are not of one kind: one is a melody model's")
    return AudiocraftModel(state=state, config=config)


def read_codec(file: Path) -> tuple[EncodecConfig, dict[str, Tensor]]:
    """The EnCodec in a compression_state_dict.bin: its configuration and its tensors by our names, on the CPU.

    Raises ModelError where the file is missing, truncated or holds something else: that of audiocraft's
    export_pretrained_compression_model holds only the name of an EnCodec.
    """
    package = load_pickled(file)
    if STATE not in package:
        raise ModelError(f"{file} does not hold EnCodec itself: add --base with the model whose EnCodec it is")
    return read_codec_config(package, file), codec_from_audiocraft(package[STATE])
