"""Reports to test: folders in memory, a page as a parser reads it, and a browser."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from trainer.data.audio import AudioFacts
from trainer.data.fates import Fate, display
from trainer.data.inventory import InspectedFile, ScannedFolder
from trainer.data.levels import Levels
from trainer.report import report
from trainer.report.settings import ReportSettings

LEVELS = Levels(
    peak=0.5, clipped_share=0.0, silent_share=0.0, lead_seconds=0.0, tail_seconds=0.0, loudness_lufs=-14.0
)


def folder_of(files: dict[str, str | None], root: str = "/music") -> ScannedFolder:
    """A folder with these captions by name, of sounds that differ."""
    inspected = tuple(
        InspectedFile(
            path=display(name), reference=os.fsencode(os.path.join(root, name)), caption=caption,
            caption_source="" if caption is None else "x.txt", caption_fields="",
            facts=AudioFacts(
                seconds=2.0 + number, sample_rate_hz=44_100, channels=2, content=f"{number:032x}", format="WAV PCM_16",
                sound=f"{number:032x}", levels=LEVELS, fingerprint="",
            ),
        )
        for number, (name, caption) in enumerate(files.items())
    )
    fates = tuple(Fate(path=one.path, fate="used") for one in inspected)
    return ScannedFolder(root=root, fates=fates, inspected=inspected)


def written(folders: list[ScannedFolder], folder: Path, settings: ReportSettings | None = None) -> Page:
    """The page that is written for them."""
    report.write(folders, settings or ReportSettings(), folder, load_tokenizer=None)
    return Page((folder / report.PAGE).read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page taken apart.

    tags     names of all elements, in order
    links    values of all attributes that can make a browser fetch something
    figures  value attributes of the elements with data-figure, by that
    data     the JSON that the page's program reads
    """

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.links = text, list[str](), list[str]()
        self.handlers, self.figures, self.scripts = list[str](), dict[str, str](), list[str]()
        self._in_script = False
        self.feed(text)
        self.close()
        self.data: dict[str, Any] = json.loads(self.scripts[0])
        self.rows = [dict(zip(self.data["columns"], row, strict=True)) for row in self.data.get("rows", [])]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("src", "href", "action", "srcset", "poster", "data") if name in values]
        self.handlers += [name for name in values if name.startswith("on")]
        if "data-figure" in values:
            self.figures[values["data-figure"]] = values["value"]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
