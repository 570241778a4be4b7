"""The README.md of an exported model: what it was made from and how, how it is loaded, and under which licence it is.

Names of folders on the user's machine are private: of a path only the last part is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.exports.card_snippets import in_audiocraft, in_transformers
from trainer.spec.shapes import DEBUG_NAMES, HUB_PREFIX, hub_id_of
from trainer.spec.trainable import EVERYTHING, Selection
from trainer.spec.trigger import Trigger, in_a_shell

CITATION = """@article{copet2023simple,
  title   = {Simple and Controllable Music Generation},
  author  = {Jade Copet and Felix Kreuk and Itai Gat and Tal Remez and David Kant and Gabriel Synnaeve
             and Yossi Adi and Alexandre Défossez},
  journal = {arXiv preprint arXiv:2306.05284},
  year    = {2023}
}"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the model card tells about how a model came to be.

    base_model       as --model_id named it
    dataset          folder or dataset id
    clips, hours     number of training clips, and hours of audio in them together
    steps            optimizer steps, up to the weights that are exported
    validation_loss  cross entropy over clips that were not trained on, in nats; None where it is not known
    hyperparameters  value by flag or quantity, in the order of the table
    started_from     as --init_from named it; None where the run started from the base model
    trained          which parameters were trained
    placeholder      the new word, where nothing but its embeddings was trained
    trigger          the phrase that stood in every caption, if one did
    channels         of the sound: 2 for a stereo model
    melody           whether the model reads a melody
    stereo_init      how the embeddings of a mono model, of --init_from or else of the base, became those of two
                     channels (--stereo_init); None where the run started from no model that was made stereo
    strength         of what was trained (trainer/exports/strength.py); None for the weights as the run made them
    """

    base_model: str
    dataset: str
    clips: int
    hours: float
    steps: int
    hyperparameters: Mapping[str, object]
    started_from: str | None = None
    trained: Selection = EVERYTHING
    placeholder: str | None = None
    trigger: Trigger | None = None
    validation_loss: float | None = None
    channels: int = 1
    melody: bool = False
    stereo_init: str | None = None
    strength: float | None = None

    @property
    def kind(self) -> str:
        """What kind of model it is, in words."""
        stereo = "stereo " if self.channels == 2 else ""
        return f"{stereo}text-to-music model{' that also reads a melody' if self.melody else ''}"


def model_card(facts: CardFacts) -> str:
    """The card of a whole model, as Hugging Face's hub reads it: front matter in YAML, then Markdown."""
    prompt = _prompt(facts)
    return f"""{_front(facts, "transformers", "finetune")}

# MusicGen, fine-tuned on {_dataset(facts)}

{_what_it_is(facts)}

## Training

{_table(facts)}

## Use
{_on_trigger(facts)}
Here:

```
python scripts/generate.py --model models/huggingface --prompt {in_a_shell(prompt)}{_melody_flag(facts)}
```

{in_transformers(prompt, channels=facts.channels, melody=facts.melody)}
{in_audiocraft(prompt, melody=facts.melody) if facts.placeholder is None else ""}
## Licence

{_licence(facts)}

## Citation

```bibtex
{CITATION}
```
"""


def _prompt(facts: CardFacts) -> str:
    """An example of a prompt, with what every caption held."""
    if facts.trigger is not None:
        return facts.trigger.put_into("...")
    return "..." if facts.placeholder is None else f"{facts.placeholder} ..."


def _melody_flag(facts: CardFacts) -> str:
    return " --melody melody.wav" if facts.melody else ""


def _on_trigger(facts: CardFacts) -> str:
    """The paragraph that says what to write in a prompt; "" where no phrase stood in every caption."""
    if facts.trigger is None:
        return ""
    return (
        f"\nEvery caption held the phrase `{_cell(facts.trigger.text)}`. With it in a prompt, {facts.trigger.place} the"
        " description, the\nmodel plays what it learned.\n"
    )


def _what_it_is(facts: CardFacts) -> str:
    base, start = _cell(name_of_base(facts.base_model)), _start(facts.started_from) + _from_mono(facts)
    if facts.placeholder is not None:
        return (
            f"A {facts.kind}: {base} with a new word, `{facts.placeholder}`,"
            f' for the music of {facts.clips} clips\n({facts.hours:.2f} hours) of "{_dataset(facts)}".'
            f" Only the word's embeddings in T5 were\nlearned (textual inversion); all else is the base model.{start}"
        )
    return (
        f"A {facts.kind}: {base} with its language model fine-tuned\n"
        f'on {facts.clips} clips ({facts.hours:.2f} hours) of "{_dataset(facts)}". T5 and EnCodec are those of'
        f" the base\nmodel.{start}{_part(facts.trained)}"
    )


def adapter_card(facts: CardFacts) -> str:
    """The card of a LoRA's adapter, which can only be used with the model that it was trained on."""
    base = _cell(name_of_base(facts.base_model))
    return f"""{_front(facts, "peft", "adapter")}

# A LoRA of MusicGen, trained on {_dataset(facts)}

An adapter for {base}, trained on {facts.clips} clips ({facts.hours:.2f} hours) of
"{_dataset(facts)}".{_start(facts.started_from)} It fits no other weights than those that it was trained on.

## Training

{_table(facts)}

## Use
{_on_trigger(facts)}
```python
from peft import PeftModel
from transformers import {_class_of(facts)}

{_base_to_load(facts)}
model = PeftModel.from_pretrained(base, "models/adapter")
```

`models/huggingface` of the same run has the adapter merged, and is loaded alone.

## Licence

{_licence(facts)}

## Citation

```bibtex
{CITATION}
```
"""


def adapter_base(base_model: str, started_from: str | None) -> str | None:
    """What transformers can load as the model that an adapter fits: a hub id, or None where there is no such name.

    The path of a folder is private (and not there for others), and weights at the start that are not the base's have
    no name at all.
    """
    return hub_id_of(base_model) if started_from is None else None


def _class_of(facts: CardFacts) -> str:
    """The class of transformers that loads such a model."""
    return "MusicgenMelodyForConditionalGeneration" if facts.melody else "MusicgenForConditionalGeneration"


def _base_to_load(facts: CardFacts) -> str:
    """The line of Python that loads the model that the adapter fits, as exactly as it can be said."""
    load = f"base = {_class_of(facts)}.from_pretrained"
    name = adapter_base(facts.base_model, facts.started_from)
    if name is not None:
        return f'{load}("{name}")'
    if facts.started_from is None:
        return f'# the folder of the base model, {_cell(name_of_base(facts.base_model))}\n{load}("path/to/it")'
    return (
        f'# the huggingface/ folder of the run that made "{_cell(Path(facts.started_from).name)}", or one in which'
        f' those weights are saved for transformers\n{load}("path/to/huggingface")'
    )


def name_of_base(model_id: str) -> str:
    """The hub id of what --model_id names, or the last part of a folder's path."""
    return hub_id_of(model_id) or Path(model_id).name


def _front(facts: CardFacts, library: str, relation: str) -> str:
    """The front matter, in YAML between lines of dashes.

    library   the library that loads the model
    relation  of the model to its base, as the hub calls it
    """
    base = hub_id_of(facts.base_model)
    if relation == "adapter":  # the hub offers to put it onto that model
        base = adapter_base(facts.base_model, facts.started_from)
    front: dict[str, object] = {"library_name": library, "pipeline_tag": "text-to-audio"}
    front["tags"] = ["musicgen", "music-generation", "text-to-music", *(["lora"] if facts.trained.lora else [])]
    if base is not None:
        front |= {"base_model": base, "base_model_relation": relation}
    if _of_meta(facts.base_model):
        front["license"] = "cc-by-nc-4.0"
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---"


def _dataset(facts: CardFacts) -> str:
    return _cell(Path(facts.dataset).name or "the dataset")


def _table(facts: CardFacts) -> str:
    rows: dict[str, object] = {"optimizer steps": facts.steps}
    if facts.strength is not None:
        rows["strength"] = f"{facts.strength:g}, where 0 is what the training started from and 1 what it made"
    if facts.validation_loss is not None:
        rows["validation loss (nats)"] = f"{facts.validation_loss:.4f}"
    rows |= {"trained": facts.trained.describe(), **facts.hyperparameters}
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _part(trained: Selection) -> str:
    if trained.lora:
        return " It was trained by LoRA, and the adapter is merged into these weights."
    return "" if trained.everything else " Parts of the language model were frozen."


def _from_mono(facts: CardFacts) -> str:
    """That a mono model was made stereo, and how; "" where none was."""
    if facts.stereo_init is None:
        return ""
    mono = "The base model is" if facts.started_from is None else "These weights were"
    return f"\n{mono} mono. Left and right started as copies of the one channel, with embeddings {facts.stereo_init}."


def _cell(value: object) -> str:
    """A value as text that breaks no table: on one line, bars escaped."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _start(started_from: str | None) -> str:
    if started_from is None:
        return ""
    return f'\nThe training started from the language model of "{_cell(Path(started_from).name)}".'


def _of_meta(base_model: str) -> bool:
    return (hub_id_of(base_model) or "").startswith(HUB_PREFIX)


def _licence(facts: CardFacts) -> str:
    licence = _licence_of_base(facts.base_model, _of_meta(facts.base_model))
    if facts.started_from is None:
        return licence
    return f"{licence} The licence of the weights at the start holds as well."


def _licence_of_base(base_model: str, meta: bool) -> str:
    if meta:
        return (
            "The base model's weights are Meta's and under CC-BY-NC 4.0, which binds this model as well: no"
            " commercial use."
        )
    if base_model in DEBUG_NAMES:
        return "The base model is a small one of random weights, under no licence. It cannot make music."
    return "That of the base model. Weights that descend from Meta's MusicGen are under CC-BY-NC 4.0."
