"""The README.md of an exported model: what it was made from and how, how to load it, under which licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.models import SHORT_NAMES

CITATION = """@article{copet2023simple,
  title   = {Simple and Controllable Music Generation},
  author  = {Jade Copet and Felix Kreuk and Itai Gat and Tal Remez and David Kant and Gabriel Synnaeve
             and Yossi Adi and Alexandre Défossez},
  journal = {arXiv preprint arXiv:2306.05284},
  year    = {2023}
}"""

IN_AUDIOCRAFT = """
audiocraft:

```python
import torch
from audiocraft.models import MusicGen

model = MusicGen.get_pretrained("models/audiocraft")
# or, into the base model: model.lm.load_state_dict(torch.load("models/lm_final.pt"))
```
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the model card tells about how a model came to be.

    base_model       what --model_id said
    started_from     what --init_from said; only its last part is published
    dataset          folder or dataset id; only its last part is published
    hours            of audio, the sum over the clips
    placeholder      the new word, where nothing but its embeddings was trained
    hyperparameters  flag or quantity to its value, in the order of the table
    """

    base_model: str
    dataset: str
    clips: int
    hours: float
    steps: int
    hyperparameters: Mapping[str, object]
    started_from: str | None = None
    placeholder: str | None = None


def model_card(training: Training) -> str:
    """A Hugging Face model card (README.md): front matter in YAML, then Markdown."""
    known = hub_id(training.base_model)
    meta = known is not None and known.startswith("facebook/musicgen-")
    dataset = Path(training.dataset).name or "the dataset"
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-to-audio"}
    front["tags"] = ["musicgen", "music-generation", "text-to-music"]
    if known is not None:
        front |= {"base_model": known, "base_model_relation": "finetune"}
    if meta:
        front["license"] = "cc-by-nc-4.0"
    base = known or Path(training.base_model).name
    prompt = "..." if training.placeholder is None else f"{training.placeholder} ..."
    start = _start(training.started_from)
    rows = {"optimizer steps": training.steps, **training.hyperparameters}
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# MusicGen, fine-tuned on {_cell(dataset)}

{_what_it_is(training, _cell(base), _cell(dataset))}{start}

## Training

| | |
|---|---|
{table}

## Use

Here:

```
python scripts/generate.py --model models/huggingface --prompt "{prompt}"
```

transformers (5 or newer; version 4 cannot read the tokenizer):

```python
from transformers import pipeline

music = pipeline("text-to-audio", model="models/huggingface")("{prompt}")
```
{IN_AUDIOCRAFT if training.placeholder is None else ""}
## Licence

{_licence(training.base_model, meta, training.started_from)}

## Citation

```bibtex
{CITATION}
```
"""


def _what_it_is(training: Training, base: str, dataset: str) -> str:
    data = f'{training.clips} clips\n({training.hours:.2f} hours) of "{dataset}"'
    if training.placeholder is None:
        return (
            f"A text-to-music model: {base} with its language model fine-tuned on {data}."
            " T5 and EnCodec are those of the base model."
        )
    return (
        f"A text-to-music model: {base} with a new word, `{training.placeholder}`, for the music of {data}.\n"
        "Only the word's embeddings in T5 were learned (textual inversion); all else is the base model."
    )


def hub_id(model_id: str) -> str | None:
    """facebook/musicgen-small for small; None for debug and for folders."""
    if model_id in SHORT_NAMES:
        return f"facebook/musicgen-{model_id}"
    return model_id if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model_id) and not Path(model_id).exists() else None


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _start(started_from: str | None) -> str:
    if started_from is None:
        return ""
    return f'\nThe training started from the language model of "{_cell(Path(started_from).name)}".'


def _licence(base_model: str, meta: bool, started_from: str | None) -> str:
    of_base = _licence_of_base(base_model, meta)
    return of_base if started_from is None else f"{of_base} The licence of the weights at the start holds as well."


def _licence_of_base(base_model: str, meta: bool) -> str:
    if meta:
        return (
            "The base model's weights are Meta's and under CC-BY-NC 4.0, which binds this model as well: no"
            " commercial use."
        )
    if base_model == "debug":
        return "The base model is a small one of random weights, under no licence. It cannot make music."
    return "That of the base model. Weights that descend from Meta's MusicGen are under CC-BY-NC 4.0."
