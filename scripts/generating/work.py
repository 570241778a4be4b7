"""What scripts/generate.py does: models opened, sounds made some at a time and written at once, and told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from generating.comparison import Heard, models_of, write_page
from generating.files import write_sound
from generating.heard_melody import melody_of
from generating.length import Length, length_of, tell
from generating.progress import Steps
from trainer.atomic import check_operations
from trainer.data.text_states import text_states
from trainer.engine.compiled import compiles
from trainer.errors import ConfigError, MemoryShortError, StorageError
from trainer.evaluation.continuation import codes_of_beginning
from trainer.evaluation.decoding import Decoding
from trainer.evaluation.generation import (
    Pace,
    Request,
    Sampling,
    WholeModel,
    decode,
    device_of,
    load_for_generation,
)
from trainer.evaluation.in_batches import bytes_of_sound, in_batches
from trainer.evaluation.samples import file_name
from trainer.evaluation.windows import generate_long
from trainer.model.source import quiet_libraries
from trainer.plan.host_memory import bytes_of_a_process, host_memory_bytes


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sound that is asked for. name: of its file."""

    prompt: str
    seed: int
    name: str


def make_all(flags: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Make and write the sounds of all prompts by each model that is asked for, and the page that compares them.

    Raises TrainerErrors.
    """
    quiet_libraries()
    device = device_of(flags.device)
    output = made_folder(Path(flags.output))
    if flags.compile and not compiles(device):
        raise ConfigError("--compile 1 cannot be used on this machine, for the reason above: leave it out")
    models = models_of(flags, output, prompts)
    source = models[-1].source
    length = length_of(flags, source.frame_rate_hz)
    melody_at = melody_of(flags, source, device, length)
    tell(flags, length)
    asked = asked_for(prompts, flags)
    files = {}
    for one in models:
        if len(models) > 1:
            print(f"{one.title}: {one.remark}")
        try:
            files[one.title] = make(one, asked, flags, length, device, melody_at)
        except torch.OutOfMemoryError as error:
            shortage = str(error).partition("\n")[0]
            raise MemoryShortError(
                f"the device's memory does not suffice ({shortage}): use a smaller model, or --device cpu"
            ) from error
    if flags.compare:
        page = write_page(output, models, files, [(one.prompt, one.seed) for one in asked], flags)
        print(f"the page: {page}")


def asked_for(prompts: Sequence[str], flags: argparse.Namespace) -> list[Asked]:
    """Each prompt as often as --repeat says. With one sound of each, the name of its file says no seed."""
    asked = []
    for number, prompt in enumerate(prompts, start=1):
        path = Path(file_name(number, prompt, flags.format))
        for seed in range(flags.seed, flags.seed + flags.repeat):
            name = path.name if flags.repeat == 1 else f"{path.stem}_seed{seed}{path.suffix}"
            asked.append(Asked(prompt=prompt, seed=seed, name=name))
    return asked


def make(
    heard: Heard,
    asked: Sequence[Asked],
    flags: argparse.Namespace,
    length: Length,
    device: torch.device,
    melody_at: Callable[[int], Tensor | None] | None,
) -> list[Path]:
    """Make the sounds by one model, write each as soon as it is made, and say so; their files in order."""
    folder = made_folder(heard.folder)
    model = load_for_generation(heard.source, device, {"fp32": "no"}.get(flags.precision, flags.precision))
    pace, files = Pace(), []
    most = most_at_once(model, flags, length, device)
    if most < min(flags.batch_size, len(asked)):
        print(f"note: this machine's memory has room for {most} sounds at once (--batch_size {most})")
    for one, codes_KT in codes_of(model, heard, asked, flags, length, melody_at, pace, most=most):
        audio = decode(model.codec, codes_KT)
        path = folder / one.name
        write_sound(path, audio, heard.source.sample_rate_hz)
        files.append(path)
        seed = f"  seed {one.seed}" if flags.repeat > 1 else ""
        seconds = len(audio) / heard.source.sample_rate_hz
        print(f"{path}  {seconds:.2f} s{seed}  {one.prompt or '(no prompt)'}", flush=True)
    print(f"{pace.codes:,} codes in {pace.seconds:.1f} s: {pace.codes_per_second:,.0f} codes per second")
    return files


def codes_of(
    model: WholeModel,
    heard: Heard,
    asked: Sequence[Asked],
    flags: argparse.Namespace,
    length: Length,
    melody_at: Callable[[int], Tensor | None] | None,
    pace: Pace,
    *,
    most: int,
) -> Iterator[tuple[Asked, Tensor]]:
    """Each sound with its codes (K, frames), as soon as those that are made together with it, `most`, are made."""
    prefix_KT = None
    if flags.continue_from is not None:
        beginning = Path(flags.continue_from)
        prefix_KT = codes_of_beginning(
            model.codec, beginning, flags.continue_seconds, channels=heard.source.channels
        )
    texts = {prompt: text_states(model.text_encoder, model.tokenizer, prompt) for prompt in {a.prompt for a in asked}}
    make_codes = partial(
        generate_long,
        model.language_model,
        frames=length.frames,
        window_frames=length.window_frames,
        stride_frames=length.stride_frames,
        sampling=Sampling(
            guidance=flags.guidance, greedy=flags.greedy, temperature=flags.temperature, top_k=flags.top_k
        ),
        melody_at=melody_at,
        decoding=Decoding(static_cache=bool(flags.compile), compiled=bool(flags.compile)),
        pace=pace,
    )
    done = 0
    while done < len(asked):
        batch = asked[done : done + most]
        requests = [
            Request(
                text_SD=texts[one.prompt], generator=torch.Generator().manual_seed(one.seed), prefix_KT=prefix_KT
            )
            for one in batch
        ]
        with Steps(model.language_model, requests, length, f"{done + len(batch)} of {len(asked)} sounds") as steps:
            smaller: list[int] = []
            made = in_batches(
                requests, partial(make_codes, should_stop=steps.count), most=most, on_smaller=smaller.append
            )
        assert made is not None, "nothing stops it"
        if smaller:
            most = smaller[-1]
            print(f"note: the device's memory has room for {most} sounds at once (--batch_size {most})")
        yield from zip(batch, made, strict=True)
        done += len(batch)


def most_at_once(model: WholeModel, flags: argparse.Namespace, length: Length, device: torch.device) -> int:
    """How many sounds are begun with at once: --batch_size, or as many as the memory has room for on a CPU.

    A GPU says by itself when its memory does not suffice. On a CPU the system ends the program instead.
    """
    if device.type != "cpu":
        return flags.batch_size
    parts = (model.language_model, model.text_encoder, model.codec)
    weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    frames = min(length.frames, length.window_frames)
    room = bytes_of_a_process(host_memory_bytes(), 1) - weights
    return max(1, min(flags.batch_size, room // bytes_of_sound(model.language_model, frames, flags.guidance)))


def made_folder(folder: Path) -> Path:
    """The folder, made where it is not there, and found to take files. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_operations(folder, whole_files_only=True)
    except OSError as error:
        raise StorageError(f"--output {folder} cannot be used ({error}): choose another folder") from error
    return folder
