"""The places that a clip's caption may come from, by the names that --captions takes, and in their usual order."""

from __future__ import annotations

from trainer.errors import ConfigError

# text: a .txt beside the sound; metadata: metadata.csv and the like; json: a .json beside the sound; template:
# --caption_template. docs/captions.md explains each.
SOURCES = ("text", "metadata", "json", "template")
SOURCES_IN_WORDS = ",".join(SOURCES)


def sources_of(listed: str) -> tuple[str, ...]:
    """The sources of a list such as "metadata,text", in its order. Raises ConfigError for what is none, or is twice."""
    sources = tuple(part.strip() for part in listed.split(","))
    if unknown := [source for source in sources if source not in SOURCES]:
        raise ConfigError(
            f"--captions {listed} cannot be used: {unknown[0] or 'an empty name'} is no source of captions. It takes a"
            f" list of {', '.join(SOURCES)}, as in --captions metadata,text."
        )
    if len(set(sources)) < len(sources):
        raise ConfigError(f"--captions {listed} cannot be used: it names a source twice.")
    return sources
