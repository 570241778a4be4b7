"""A phrase that stands in every caption of a run, and then calls up in a prompt what the run learned."""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass
from typing import Literal

Place = Literal["before", "after"]
MOST_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A phrase, and where it is put in a caption that does not hold it."""

    text: str
    place: Place

    def put_into(self, caption: str | None) -> str:
        """The caption with the phrase once in it: "slow rock" becomes "in my-style, slow rock" or "slow rock, in
        my-style"; no caption (None), or a blank one, the phrase alone.

        A caption that holds the phrase already, as whole words in whatever case, is returned as it is.
        """
        if caption is None or not caption.strip():
            return self.text
        if self._pattern.search(unicodedata.normalize("NFC", caption)):
            return caption
        if self.place == "before":
            return f"{self.text}, {caption}"
        sentence = caption.endswith((".", "!", "?"))
        return f"{caption} {self.text}" if sentence else f"{caption.rstrip(' ,;')}, {self.text}"

    def taken_out_of(self, caption: str) -> str:
        """The caption without the phrase, and without the comma that would be left over; "" where nothing else is.

        What of the caption may be left out while training: were it the whole, half a phrase could be left in it.
        """
        caption = unicodedata.normalize("NFC", caption)
        if not self._pattern.search(caption):
            return caption
        text = " ".join(self._pattern.sub(" ", caption).split())
        return re.sub(r"\s*([,;])(?:\s*[,;])*", r"\1", text).strip(" ,;")

    def describe(self) -> str:
        """What happens to the captions, in words."""
        return f'"{self.text}" stands once in every caption, {self.place} it where it is not there yet (--trigger)'

    @property
    def _pattern(self) -> re.Pattern[str]:
        words = r"\s+".join(map(re.escape, unicodedata.normalize("NFC", self.text).split()))
        return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def why_no_trigger(text: str) -> str | None:
    """Why a text can be no trigger, in words that go on from it; None where it can."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        return "holds line breaks, control characters or bytes that are no text: give a phrase on one line"
    if not re.search(r"\w", text):
        return "has no word in it: give a phrase such as 'in my-style'"
    if len(text) > MOST_CHARACTERS:
        return f"has {len(text):,} characters: give a phrase of {MOST_CHARACTERS} at most"
    return None


def in_a_shell(prompt: str) -> str:
    """A prompt as it is typed in a shell: in double quotes, unless it holds what a shell reads within them."""
    return shlex.quote(prompt) if set(prompt) & set('"$`\\!') else f'"{prompt}"'
