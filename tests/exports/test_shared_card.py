"""The sections of a card on the hub: people's texts stay texts, figures are those of the files, others are left out."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from huggingface_hub import ModelCard

from tests.exports.test_model_card import _facts
from trainer.exports.model_card import Shared, model_card
from trainer.exports.shared_card import SoundRow, figures_of, sounds_section

ADDRESS = "https://huggingface.co/ann/x/resolve/main"
HOSTILE = '</td><script>alert(1)</script>\n\n# "a" | b & <audio src=x>'

SHARES = {"exact": 0.4, "partial": 0.6, "equal": 0.715, "chance": 0.01}
RECALL = {
    "format": "musicgen-trainer recall",
    "version": 2,
    "memorisation": {"rows": [
        {"group": "held out", "model": "after", "prompt_seconds": 5, "clips": 10, "first_codebook": SHARES}
    ]},
}  # fmt: skip
KAD = {"base": [1.5, 1, 2], "tuned": [0.5, 0.25, 0.75], "difference": [-1, -1.5, -0.5], "verdict": "better"}
SCORE = {
    "format": "musicgen-trainer score", "version": 1, "clips": 12, "generated": 24, "few": True, "seconds": 10.0,
    "embeddings": {"encodec": {"distances": {"kad": KAD, "frechet": KAD | {"verdict": None}}}},
}  # fmt: skip


class Tags(HTMLParser):
    """The tags of a piece of HTML, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_prompt_is_shown_as_it_is_and_is_no_markup() -> None:
    rows = [SoundRow(prompt=HOSTILE, before="samples/01_a_before.mp3", after="samples/01_a_after.mp3")]
    section = sounds_section(rows, address=ADDRESS, before="base", after="fine-tuned", note="")
    table = section[section.index("<table>") :]
    assert "\n\n" not in table, "an empty line would end the block of HTML, and what follows would be Markdown"
    tags = Tags(table)
    assert {tag for tag, _ in tags.tags} == {"table", "tr", "th", "td", "audio"}
    assert " ".join(HOSTILE.split()) in tags.text
    sounds = [attributes["src"] for tag, attributes in tags.tags if tag == "audio"]
    assert sounds == [f"{ADDRESS}/samples/01_a_{side}.mp3" for side in ("before", "after")]


def test_without_sounds_of_the_base_there_is_no_column_for_them_and_without_any_no_section() -> None:
    rows = [SoundRow(prompt="", before=None, after="samples/01_a_after.mp3")]
    section = sounds_section(rows, address=ADDRESS, before="base", after="fine-tuned", note="")
    assert "base" not in section and "no prompt" in section
    assert sounds_section([], address=ADDRESS, before="base", after="fine-tuned", note="") == ""


def test_figures_are_those_of_the_files_in_the_text_and_for_the_hub() -> None:
    figures = figures_of(SCORE, RECALL)
    assert "| KAD, EnCodec | 1.5 (1 to 2) | 0.5 (0.25 to 0.75) | -1 (-1.5 to -0.5) | better |" in figures.section
    assert "| Fréchet distance, EnCodec | 1.5 (1 to 2)" in figures.section and "| not told apart |" in figures.section
    assert "24 generated sounds of 10 s from 12 clips" in figures.section and "fewer than 50" in figures.section
    assert "| held out | after | 5 s | 10 | 40.0 % | 60.0 % | 71.5 % | 1.0 % |" in figures.section
    loss = {"type": "loss", "value": 3.2, "name": "validation loss (nats)"}
    shared = Shared(
        repository="ann/x", sections=figures.section, datasets=("ann/songs",), results=[loss, *figures.results]
    )
    read = ModelCard(model_card(_facts(base_model="small", dataset="ann/songs"), shared)).data
    found = {result.metric_type: result.metric_value for result in read.eval_results or []}
    assert found == {"loss": 3.2, "kad_encodec": 0.5, "frechet_encodec": 0.5}
    assert (read.base_model, read.base_model_relation) == ("facebook/musicgen-small", "finetune")
    assert (read.license, read.datasets, read.library_name) == ("cc-by-nc-4.0", ["ann/songs"], "transformers")
    assert read.pipeline_tag == "text-to-audio" and "musicgen" in (read.tags or [])


def test_files_of_other_kinds_are_named_and_left_out_and_the_older_list_has_nothing_to_tell() -> None:
    others: list[Any] = ["", [1], {}, {"format": "other", "version": 1}, {**SCORE, "version": 2}, {**SCORE, "few": 0}]
    for score in others[:-1]:
        assert figures_of(score, None).unread == ["score.json"], score
    assert not figures_of(others[-1], None).unread
    broken = {**RECALL, "memorisation": {"rows": [{"group": "held out"}]}}
    assert figures_of(None, broken).unread == ["recall.json"]
    assert figures_of(None, [{"clip": "a"}]) == figures_of(None, None)


def test_the_card_of_a_repository_names_it_and_no_file_that_is_not_there() -> None:
    card = model_card(_facts(base_model="small", dataset="/home/ann/songs"), Shared(repository="ann/x"))
    assert "models/" not in card and "audiocraft" not in card and "/home" not in card
    assert 'pipeline("text-to-audio", model="ann/x")' in card and "--model ann/x" in card
    assert "no\ncommercial use" in card or "no commercial use" in card
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(block, "card", "exec")
    assert "datasets" not in (ModelCard(card).data.to_dict())
