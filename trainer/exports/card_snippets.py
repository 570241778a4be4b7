"""The code on a model card: how transformers and audiocraft load the model and make music with it."""

from __future__ import annotations

import json


def in_transformers(prompt: str, *, channels: int, melody: bool, model: str) -> str:
    """How transformers makes music with what huggingface/ holds, as Markdown.

    model             the folder, or the repository of the hub that holds the same files
    channels, melody  what kind of model it is: the pipeline takes a mono text model, and audio in two channels needs
                      three steps more than frames, which the code says
    """
    words = _in_python(prompt)
    if melody:
        return f"""transformers (5.18 or newer: older ones read neither melody nor text while they generate), with
torchaudio, without which there is no processor for melodies:

```python
import soundfile
from transformers import AutoProcessor, MusicgenMelodyForConditionalGeneration

processor = AutoProcessor.from_pretrained({_in_python(model)})
model = MusicgenMelodyForConditionalGeneration.from_pretrained({_in_python(model)})
melody, _ = soundfile.read("melody.wav", dtype="float32")  # mono, at 32 kHz; 30 s of it are read at most
inputs = processor(audio=melody, sampling_rate=32000, text=[{words}], padding=True, return_tensors="pt")
{_generate(channels)}
```"""
    if channels == 2:
        return f"""transformers (4.46 or newer):

```python
from transformers import AutoProcessor, MusicgenForConditionalGeneration

processor = AutoProcessor.from_pretrained({_in_python(model)})
model = MusicgenForConditionalGeneration.from_pretrained({_in_python(model)})
inputs = processor(text=[{words}], padding=True, return_tensors="pt")
{_generate(channels)}
```"""
    return f"""transformers (4.46 or newer):

```python
from transformers import pipeline

music = pipeline("text-to-audio", model={_in_python(model)})({words})
```"""


def in_audiocraft(prompt: str, *, melody: bool) -> str:
    """How audiocraft loads what audiocraft/ and lm_final.pt hold, as Markdown between empty lines."""
    with_melody = f"""melody, rate = torchaudio.load("melody.wav")
audio = model.generate_with_chroma([{_in_python(prompt)}], melody[None], rate)
"""
    return f"""
audiocraft{", with torchaudio, librosa and demucs, which its melody models need" if melody else ""}:

```python
import torch
{"import torchaudio" + chr(10) if melody else ""}from audiocraft.models import MusicGen

model = MusicGen.get_pretrained("models/audiocraft")
# or, into the base model: model.lm.load_state_dict(torch.load("models/lm_final.pt"))
{with_melody if melody else ""}```
"""


def _generate(channels: int) -> str:
    shape = "(1, 2, samples): left and right" if channels == 2 else "(1, 1, samples)"
    return f"""# 10 s: 50 new tokens per second, and 3 more because the last codebook comes 3 steps later
audio = model.generate(**inputs, max_new_tokens=10 * 50 + 3)  # {shape}"""


def _in_python(prompt: str) -> str:
    return json.dumps(prompt, ensure_ascii=False)  # a string of Python's too
