"""The settings of a run: every flag declared once, with its default, help and check."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from trainer.errors import ConfigError
from trainer.flags import command_line
from trainer.flags.best_flags import BestFlags
from trainer.flags.contradictions import refuse_contradicting_values, refuse_flags_without_effect
from trainer.flags.data_flags import DataFlags
from trainer.flags.flag import Flag, Value, checked_values
from trainer.flags.hardware_flags import HardwareFlags
from trainer.flags.paths import expanded
from trainer.flags.sample_flags import SampleFlags
from trainer.flags.sharing_flags import SharingFlags
from trainer.flags.sound_flags import SoundFlags
from trainer.spec.caption_sources import sources_of
from trainer.spec.trainable import (
    ALL_LAYERS,
    FREEZABLE,
    TARGETS_IN_WORDS,
    NewWord,
    Placeholder,
    Selection,
    selection_of_flags,
)
from trainer.spec.trigger import Trigger

PROGRAM = "launch.py"
MELODY_RATE = 0.5  # audiocraft 1.3.0, config/conditioner/chroma2music.yaml, attribute_dropout.wav.self_wav
DESCRIPTION = """Fine-tune MusicGen on a folder of sound files with a .txt caption each.

Flags are written --name value or --name=value; switches are 0 or 1, and a bare one is 1. In paths ~, $NAME and ${NAME}
mean what they mean in a shell. --config FILE (.yaml or .json) holds flags by name; those on the command line win."""

model = partial(Flag, "model")
optimisation = partial(Flag, "optimisation")
output = partial(Flag, "output")
logging = partial(Flag, "logging")


@dataclass(frozen=True, kw_only=True)
class Config(SharingFlags, BestFlags, SampleFlags, SoundFlags, HardwareFlags, DataFlags):
    """What the user asked for. Building one checks each value; only `parse` knows which flags were typed."""

    model_id: Annotated[
        str,
        model(
            "small, medium, large, melody, melody-large, or one of these behind stereo-; a Hugging Face id; a local "
            "folder, also of the hub's cache; or debug (debug-stereo, debug-melody, debug-stereo-melody), a tiny model "
            "with random weights.",
            path=True,
        ),
    ] = "small"
    init_from: Annotated[
        str | None,
        model(
            "Start from the weights of an earlier run, a checkpoint, an lm_*.pt, a Hugging Face or audiocraft folder "
            "or file of the same size; none: those of --model_id.",
            path=True,
        ),
    ] = None
    dropout: Annotated[float, model("Dropout of the decoder; audiocraft trains with 0 too.", least=0, below=1)] = 0.0
    freeze: Annotated[
        str | None,
        model(f"Parts that are not trained, a list of {FREEZABLE}; layers are counted from 0; none: all are trained."),
    ] = None
    lora_rank: Annotated[
        int | None, model("Train adapters of this rank (LoRA) and nothing else; none: no adapters.", least=1)
    ] = None
    lora_alpha: Annotated[
        float | None, model("With --lora_rank: adapters count alpha / rank times; none: twice the rank.", above=0)
    ] = None
    lora_dropout: Annotated[
        float, model("With --lora_rank: dropout of the adapters' inputs while training.", least=0, below=1)
    ] = 0.0
    lora_targets: Annotated[
        str, model(f"With --lora_rank: linear layers that get an adapter, a list of {TARGETS_IN_WORDS}.")
    ] = ALL_LAYERS
    base_bits: Annotated[
        Literal[4, 8] | None,
        model(
            "With --lora_rank or --tune_text 1, on CUDA GPUs: hold the frozen linear layers in so many bits (NF4 or "
            "int8, by bitsandbytes); none: in the precision of the computation."
        ),
    ] = None
    tune_text: Annotated[
        bool, model("Learn a new word for T5, by embeddings of its own; all else stays as it is.")
    ] = False
    placeholder: Annotated[
        str, model("With --tune_text 1: the new word, in angle brackets; put before captions that lack it.")
    ] = "<music-style>"
    placeholder_vectors: Annotated[
        int, model("With --tune_text 1: embeddings that the new word has.", least=1, most=64)
    ] = 4
    init_word: Annotated[
        str, model("With --tune_text 1: the word whose embedding the new ones start from.")
    ] = "music"

    optimizer: Annotated[
        Literal["adamw", "adamw8bit"],
        optimisation(
            "adamw8bit: AdamW with moments of 8 bits (bitsandbytes), 6 bytes per parameter less; on one GPU or with "
            "--strategy ddp."
        ),
    ] = "adamw"
    lr: Annotated[float, optimisation("Peak learning rate of AdamW (betas 0.9, 0.95).", above=0)] = 1e-5
    lr_schedule: Annotated[
        Literal["cosine", "linear", "constant"], optimisation("Course of the learning rate after the warmup.")
    ] = "cosine"
    warmup_steps: Annotated[
        int, optimisation("Steps over which the learning rate rises to --lr.", least=0)
    ] = 16
    min_lr_ratio: Annotated[
        float, optimisation("Learning rate at the end, as a share of --lr.", least=0, most=1)
    ] = 0.0
    weight_decay: Annotated[float, optimisation("Weight decay of every parameter.", least=0)] = 1e-5
    max_grad_norm: Annotated[
        float, optimisation("Gradients with a larger norm are scaled down to this norm.", above=0)
    ] = 1.0
    ema_decay: Annotated[
        float | None,
        optimisation(
            "Keep an average of the weights: each step keeps this share of it (0.999: over some 1000 steps) and adds "
            "the rest from the weights; exports and validation use the average; none: no average.",
            above=0,
            below=1,
        ),
    ] = None
    epochs: Annotated[int, optimisation("Passes over the dataset.", least=1)] = 100
    max_steps: Annotated[
        int | None,
        optimisation("Stop after this many steps, even if epochs are left; the schedule ends there too.", least=1),
    ] = None
    batch_size: Annotated[
        int,
        optimisation(
            "Clips per device and micro-batch, at most: fewer if memory is short. Where the flag is not given, up to "
            "16 within 85 % of a GPU's memory, if nothing has dropout; the clips of a step stay.",
            least=1,
        ),
    ] = 4
    grad_acc: Annotated[int, optimisation("Micro-batches that make one step.", least=1)] = 2
    global_batch: Annotated[
        int | None,
        optimisation(
            "Clips per step on all devices together; none: batch_size x grad_acc x devices.", least=1
        ),
    ] = None
    use_cfg: Annotated[
        bool, optimisation("Drop captions at random, so that classifier-free guidance keeps working.")
    ] = False
    cfg_rate: Annotated[
        float, optimisation("Share of captions dropped with --use_cfg 1.", above=0, below=1)
    ] = 0.1
    seed: Annotated[int, optimisation("Seed of every random choice.", least=0, most=2**32 - 1)] = 0

    output_dir: Annotated[str, output("Folder for the trained model, checkpoints and logs.", path=True)] = "models"
    save_step: Annotated[
        int | None, output("Write lm_<step>.pt every so many steps; none: at the end only.", least=1)
    ] = None
    checkpoint_minutes: Annotated[float, output("Minutes between resumable checkpoints.", above=0)] = 15.0
    max_minutes: Annotated[
        float | None,
        output(
            "Stop with a checkpoint and exit code 75 once so many minutes have passed since the start, loading "
            "and encoding included; none: no limit.",
            above=0,
        ),
    ] = None
    resume: Annotated[
        str,
        output(
            "auto: go on from the newest checkpoint in output_dir, if any; no: start anew, in a folder "
            "without a run; or the path of a checkpoint.",
            path=True,
        ),
    ] = "auto"

    use_wandb: Annotated[
        bool, logging("Log to Weights & Biases; with WANDB_MODE=offline the run's end prints how to upload.")
    ] = False
    wandb_project: Annotated[str, logging("Project on Weights & Biases.")] = "musicgen-trainer"
    use_tensorboard: Annotated[
        bool, logging("Log to TensorBoard, in output_dir; bash scripts/setup.sh tensorboard installs it.")
    ] = False
    log_steps: Annotated[int, logging("Steps between log lines.", least=1)] = 1
    validation_steps: Annotated[
        int | None, logging("Steps between validations; none: once per epoch.", least=1)
    ] = None

    def __post_init__(self) -> None:
        for name, value in checked_values(Config, dataclasses.asdict(self)).items():
            object.__setattr__(self, name, value)  # a whole number given for a float is now a float
        refuse_contradicting_values(self)
        _ = self.selection  # raises ConfigError for a list of parts or layers that it does not understand

    @property
    def selection(self) -> Selection:
        """Which parameters are trained."""
        return selection_of_flags(dataclasses.asdict(self))

    @property
    def new_word(self) -> NewWord | None:
        """The word that is learned; None without --tune_text 1."""
        if not self.tune_text:
            return None
        placeholder = Placeholder(word=self.placeholder, vectors=self.placeholder_vectors)
        return NewWord(placeholder=placeholder, init_word=self.init_word)

    @property
    def caption_trigger(self) -> Trigger | None:
        """The phrase that stands in every caption; None without --trigger."""
        if self.trigger is None:
            return None
        return Trigger(text=" ".join(self.trigger.split()), place=self.trigger_place)

    @property
    def caption_sources(self) -> tuple[str, ...]:
        """Where captions are looked for, in this order."""
        return sources_of(self.captions)

    @property
    def caption_drop_rate(self) -> float:
        """Probability that a clip is trained without caption and melody; 0 unless --use_cfg 1."""
        return self.cfg_rate if self.use_cfg else 0.0

    @property
    def embeddings_in_stereo(self) -> Literal["halved", "copied"] | None:
        """What the embeddings of a mono model made stereo start as; None without --stereo 1."""
        return self.stereo_init if self.stereo else None

    @property
    def melody_drop_rate(self) -> float:
        """Probability that a clip of a melody model is trained without its melody, though with its caption."""
        return MELODY_RATE if self.melody_rate is None else self.melody_rate

    @property
    def validation_share(self) -> float:
        """Share of the dataset's files kept for validation, in [0, 1); 0 if a folder or nothing was given."""
        share = _number(self.validation)
        return 0.0 if share is None else share

    @property
    def validation_folder(self) -> str | None:
        """The folder to validate on; None if a share was given."""
        return self.validation if _number(self.validation) is None else None

    def to_dict(self) -> dict[str, Value]:
        """All flags by name, as plain JSON values; `config_from_dict` gives an equal Config."""
        return dataclasses.asdict(self)


def parse(argv: Sequence[str]) -> tuple[Config, frozenset[str]]:
    """The Config that `argv` (without the program's name) asks for, and the names of the flags it states.

    A flag is stated on the command line or in the file of --config; the command line wins. Raises ConfigError
    for everything that cannot work; --help prints and leaves by SystemExit(0).
    """
    if any(argument in ("--help", "-h") for argument in argv):
        command_line.print_help(Config, prog=PROGRAM, description=DESCRIPTION)
    texts, path = command_line.texts_of_command_line(Config, argv)
    if path is not None:
        texts = command_line.texts_of_file(Config, expanded(path)) | texts
    values: dict[str, Any] = command_line.values_of_texts(Config, texts)
    config, typed = Config(**values), frozenset(texts)
    refuse_flags_without_effect(config, typed)
    return config, typed


def config_from_dict(values: Mapping[str, object]) -> Config:
    """The Config that `to_dict` wrote as `values`; a flag that is absent has its default.

    Raises ConfigError for an unknown name, for a value of the wrong type or range, and without dataset_path.
    """
    checked: dict[str, Any] = checked_values(Config, values)
    if "dataset_path" not in checked:
        raise ConfigError("dataset_path is missing: it must name the folder of the dataset.")
    return Config(**checked)


def _number(text: str) -> float | None:
    """The number that `text` is; None for other text."""
    try:
        return float(text)
    except ValueError:
        return None
