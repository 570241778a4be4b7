"""Walks a data folder: finds every sound file with the caption file beside it, and gives all other files their fate.

No file is opened whose suffix says what it is; another one is told by its first bytes. A caption file that is in use
has no fate of its own, since it shares that of its clip.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainer.data.fates import Fate, FateKind, display
from trainer.data.sound_kind import OTHER_SUFFIXES, SOUND_SUFFIXES, is_sound_file

JUNK_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # what macOS and Windows leave behind


# What a sync tool leaves in place of a file that it keeps elsewhere: the file's own name stands in the first group.
# Each is what the name begins with, how it ends, and why the file is not here.
PLACEHOLDERS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"\.(.+)", (".icloud",), "kept in iCloud alone: in Finder, Download Now, or `brctl download` its folder"),
    (r"(.+)", (".nextcloud", ".owncloud"), "a placeholder of Nextcloud or ownCloud: make it available locally"),
    (r"(.+)", (".cloud", ".cloudf"), "a placeholder of odrive: sync it"),
    (r"(.+)", (".rsls",), "a placeholder of Resilio Sync: sync it to this device"),
    (r"[.~]syncthing[.~](.+)", (".tmp",), "being copied by Syncthing: wait until it is done"),
    (
        r"(.+)", (".crdownload", ".part", ".partial", ".download", ".!sync"),
        "an unfinished download: fetch it again",
    ),
)
_PLACEHOLDERS = tuple((re.compile(start + f"(?:{'|'.join(map(re.escape, ends))})"), why)
                      for start, ends, why in PLACEHOLDERS)
_PLACEHOLDER_ENDS = tuple(end for _, ends, _ in PLACEHOLDERS for end in ends)
GOOGLE_DOCUMENTS = (".gdoc", ".gsheet", ".gslides")  # of Google Drive: they hold a link and no text


RESOURCE = "what macOS keeps beside a file on other disks (AppleDouble): no sound or caption itself"
NEITHER = "neither a sound nor a caption"
# Of a song.txt that is its caption, the caption that is written for training, and lyrics, which are no caption.
CAPTION_END, LYRICS_END = ".caption", ".lyrics"
LYRICS_ENDS = (LYRICS_END, "_lyrics", "-lyrics")  # as in song_lyrics.txt, of the first ACE-Step
# Names of captions beside a sound that are not read: song_prompt.txt, of the first ACE-Step, song-caption.txt.
_OTHER_CAPTION = re.compile(r"(.+)(?:[_-](?:prompt|caption)|\.prompt)", re.IGNORECASE)
MELODY_END = ".melody"  # of a song.melody.wav that is the melody of song.wav
METADATA_STEM, METADATA_SUFFIXES = "metadata", (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A sound file, or what has the name of one, and the caption file beside it; both relative to the data folder.

    caption_name  "" where there is none
    elsewhere     what stands in the caption's place where a sync tool keeps it elsewhere, and why; else ""
    json_name     of a .json file of the same name, "" where there is none
    melody_name   of the sound file that is its melody, "" where there is none
    melody_elsewhere  what stands in the melody's place where a sync tool keeps it elsewhere, and why; else ""
    """

    name: str
    caption_name: str
    elsewhere: str = ""
    json_name: str = ""
    melody_name: str = ""
    melody_elsewhere: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether the caption file, if there is one, is song.txt or song.wav.txt, as it was before others were read."""
        return not loose(stem(self.caption_name)).endswith(CAPTION_END) or loose(stem(self.name)).endswith(CAPTION_END)


@dataclass(frozen=True, kw_only=True)
class MetadataFile:
    """A file that may hold captions of many sounds: metadata.csv and the like, and any other .csv.

    name       relative to the data folder
    elsewhere  why it is not here, where a sync tool keeps it elsewhere; else ""
    """

    name: str
    elsewhere: str = ""

    @property
    def is_metadata(self) -> bool:
        """Whether its name says that it holds captions; another .csv may do so, too, as ACE-Step's."""
        return bool(self.elsewhere) or stem(os.path.basename(self.name)).lower() == METADATA_STEM

    @property
    def unread(self) -> str:
        """What is said of it where it was not read, or holds other things."""
        return "not read: no file here needs a caption from it" if self.is_metadata else NEITHER


Found = Sound | MetadataFile | Fate


def walk(root: str) -> Iterator[Found]:
    """Every sound file below the folder `root`, the files that may hold captions of many, and the fates of all else.

    Linked folders are searched under the link's name, after all others. Each real folder is searched once: a link back
    to where it came from is left out, and so is a second way to the same folder.
    """
    found_at: dict[str, str] = {}  # the real path of each folder that was searched: its name below `root`
    links: list[tuple[str, str]] = []
    yield from _search(root, "", os.path.realpath(root), found_at, links)
    while links:
        following: list[tuple[str, str]] = []
        for name, inside in sorted(links):
            real = os.path.realpath(os.path.join(root, name))
            if _holds(real, inside) or _holds(real, os.path.realpath(root)):
                yield Fate(path=display(name), fate="ignored", detail="linked folder that holds this one: not followed")
            else:
                yield from _search(root, name, real, found_at, following)
        links = following


def _search(
    root: str, start: str, real_start: str, found_at: dict[str, str], links: list[tuple[str, str]]
) -> Iterator[Found]:
    """All below one folder but what is linked there: links to folders are added to `links`.

    start       the folder's name below `root`, "" for `root` itself; real_start is its real path
    found_at    see `walk`; the folders that are searched are added
    links       (name, real path of the folder in which it lies)
    """
    unreadable: list[OSError] = []
    top = os.path.join(root, start) if start else root
    for parent, folders, names in os.walk(top, onerror=unreadable.append):
        inside = os.path.relpath(parent, top)
        real = real_start if inside == "." else os.path.join(real_start, inside)
        place = "" if parent == root else os.path.relpath(parent, root)
        if real in found_at:
            folders.clear()
            same = display(found_at[real] or ".")
            yield Fate(path=display(place), fate="ignored", detail=f"the same folder as {same}, which is searched")
            continue
        found_at[real] = place
        prefix = place and place + os.sep
        keep = []
        for name in sorted(folders):
            if _is_junk(name):
                yield Fate(path=display(prefix + name), fate="ignored", detail="hidden folder, skipped whole")
            elif os.path.islink(os.path.join(parent, name)):
                links.append((prefix + name, real))
            else:
                keep.append(name)
                if _suffix(name) in SOUND_SUFFIXES:
                    detail = "a folder, searched like any other"
                    yield Fate(path=display(prefix + name), fate="not a file", detail=detail)
        folders[:] = keep
        yield from _pair(parent, prefix, sorted(names))
    for error in unreadable:
        detail = f"folder not searched ({error.strerror}): check its rights"
        yield Fate(path=display(os.path.relpath(error.filename, root)), fate="unreadable", detail=detail)


def _holds(folder: str, other: str) -> bool:
    """Whether `other` is the real folder `folder`, or lies in it."""
    return os.path.commonpath([folder, other]) == folder


def _pair(folder: str, prefix: str, names: list[str]) -> Iterator[Found]:
    """The sound files of one folder with their captions, and the fates of its other files.

    prefix  the folder's name below the root, with a slash behind it; "" for the root itself
    """
    suffixes = {name: _suffix(name) for name in names}
    visible = [name for name in names if not _is_junk(name)]
    sounds = [name for name in visible if _is_sound(folder, name, suffixes[name])]
    texts = [name for name in visible if suffixes[name] == ".txt"]
    elsewhere = {loose(real): why for real, why in map(_placeholder, names) if why}
    no_melody = _melodies_elsewhere(elsewhere)
    clip_of = melodies_among(sounds)
    clips = [name for name in sounds if name not in clip_of]
    melody_of = _chosen_melodies(clips, clip_of)
    caption_of = _captions(clips, texts)
    json_of = _captions(clips, [name for name in visible if suffixes[name] == ".json"], plain_only=True)
    taken = {*caption_of.values(), *json_of.values()}
    for name in clips:
        caption_name, json_name = caption_of.get(name, ""), json_of.get(name, "")
        melody_name = melody_of.get(name, "")
        yield Sound(
            name=prefix + name, caption_name=caption_name and prefix + caption_name,
            elsewhere="" if caption_name else _why_no_text(name, names, elsewhere),
            json_name=json_name and prefix + json_name,
            melody_name=melody_name and prefix + melody_name,
            melody_elsewhere="" if melody_name or not no_melody else no_melody.get(loose(stem(name)), ""),
        )
    for name, clip in clip_of.items():
        yield _fate_of_melody(display(prefix + name), display(clip), is_chosen=name in melody_of.values())
    in_use = taken.union(sounds)
    others = [name for name in names if name not in in_use]
    is_any_text = any(suffixes[name] == ".txt" for name in others)
    owners = {loose(key) for name in clips for key in (stem(name), name)} if is_any_text else set()
    of_melodies = {loose(key): clip for name, clip in clip_of.items() for key in (stem(name), name)}
    for name in others:
        shown, suffix = display(prefix + name), suffixes[name]
        real, why = _placeholder(name)
        if why and is_metadata(real):
            yield MetadataFile(name=prefix + name, elsewhere=why)
        elif why and (_suffix(real) == ".txt" or _suffix(real) in SOUND_SUFFIXES):
            kind: FateKind = "ignored" if _suffix(real) == ".txt" else "unreadable"
            yield Fate(path=shown, fate=kind, detail=f"{display(real)} is {why}")
        elif _is_junk(name):
            detail = RESOURCE if name.startswith("._") else "hidden or system file"
            yield Fate(path=shown, fate="ignored", detail=detail)
        elif suffix == ".txt" and (of_clip := of_melodies.get(loose(stem(name)).removesuffix(CAPTION_END))):
            yield Fate(path=shown, fate="ignored", detail=f"not read: it is beside the melody of {display(of_clip)}")
        elif suffix == ".txt":
            yield _fate_of_text(name, shown, owners, taken)
        elif (suffix == ".csv" or is_metadata(name)) and not _leads_nowhere(os.path.join(folder, name)):
            yield MetadataFile(name=prefix + name)
        else:
            lost = _leads_nowhere(os.path.join(folder, name))
            yield Fate(path=shown, fate="ignored", detail=lost or NEITHER)


def melodies_among(sounds: list[str]) -> dict[str, str]:
    """By the names of one folder's sounds that are melodies, the clip that each is beside: ballad.wav of
    ballad.melody.wav. Names are compared as `loose` does, and a melody has no melody: x.melody.melody.wav is none where
    x.melody.wav is that of x.wav."""
    marked = {name: own for name in sounds if (own := loose(stem(name))).endswith(MELODY_END)}
    if not marked:
        return {}
    clips: dict[str, str] = {}
    for name in sounds:
        if name not in marked:
            clips.setdefault(loose(stem(name)), name)
    found: dict[str, str] = {}
    for name, own in sorted(marked.items(), key=lambda item: (len(item[1]), item[0])):
        clip = clips.get(own.removesuffix(MELODY_END))
        if clip is None:
            clips.setdefault(own, name)
        else:
            found[name] = clip
    return found


def _chosen_melodies(clips: list[str], melodies: Iterable[str]) -> dict[str, str]:
    """The melody of each clip that has one: that of just its name, or else one that differs as `loose` allows."""
    ordered = sorted(melodies, reverse=True)  # so that of several the first by name stays
    if not ordered:
        return {}
    exact = {stem(name): name for name in ordered}
    loosely = {loose(stem(name)): name for name in ordered}
    found = {clip: exact.get(stem(clip) + MELODY_END) or loosely.get(loose(stem(clip)) + MELODY_END) for clip in clips}
    return {clip: melody for clip, melody in found.items() if melody}


def _fate_of_melody(shown: str, clip: str, *, is_chosen: bool) -> Fate:
    if is_chosen:
        return Fate(path=shown, fate="melody", detail=f"of {clip}")
    return Fate(path=shown, fate="ignored", detail=f"another melody file fits {clip} better")


def _is_sound(folder: str, name: str, suffix: str) -> bool:
    """Whether a file is to be read as a sound. What a sync tool keeps elsewhere is none."""
    if suffix in SOUND_SUFFIXES or suffix in OTHER_SUFFIXES:  # no placeholder ends as a sound does
        return suffix in SOUND_SUFFIXES
    return not _placeholder(name)[1] and is_sound_file(os.path.join(folder, name), suffix)


def _fate_of_text(name: str, shown: str, owners: set[str], taken: set[str]) -> Fate:
    """The fate of a .txt file that is no sound's caption."""
    own = loose(stem(name))
    beside = own + CAPTION_END
    if own in owners and any(loose(stem(other)) == beside for other in taken):
        detail = "not read, as lyrics: the caption is in the .caption.txt beside it"
        return Fate(path=shown, fate="ignored", detail=detail)
    if own in owners or (own.endswith(CAPTION_END) and own.removesuffix(CAPTION_END) in owners):
        return Fate(path=shown, fate="ignored", detail="another caption file fits its sound better")
    if own.endswith(LYRICS_ENDS) and own[: -len(LYRICS_END)] in owners:
        return Fate(path=shown, fate="ignored", detail="lyrics: no caption, and not trained on")
    if (match := _OTHER_CAPTION.fullmatch(stem(name))) and loose(match[1]) in owners:
        detail = f"not read: to be the caption of the sound beside it, it is named {display(match[1])}.caption.txt"
        return Fate(path=shown, fate="ignored", detail=detail)
    advice = ", or give the text the name of its sound (of a whole folder: --default_caption)" if owners else ""
    return Fate(path=shown, fate="no audio", detail=f"no sound of this name beside it: add it{advice}")


def _captions(sounds: list[str], texts: list[str], *, plain_only: bool = False) -> dict[str, str]:
    """The caption file of each sound that has one: song.caption.txt of song.wav, or else song.txt or song.wav.txt.

    plain_only  whether song.caption.txt is nobody's

    A name that differs in case, or in how accents are stored, will do where no sound has just that name.
    """
    if not texts:
        return {}
    exact = {stem(name): name for name in texts}  # sorted, so x.txt wins over x.TXT
    stems = {name: stem(name) for name in sounds}
    owned = {*stems.values(), *sounds}
    loosely = {loose(own): name for name in texts if (own := stem(name)) not in owned}
    stems_alone = set(stems.values())
    found = {}
    for name, own in stems.items():
        # song.caption.txt is that of song.caption.wav, if there is one
        marked = None if plain_only or not loosely else loosely.get(loose(own) + CAPTION_END)
        # song.wav.txt is that of song.wav.wav, if there is one
        full = exact.get(name) if name not in stems_alone else None
        plain = exact.get(own) or full or loosely.get(loose(own)) or loosely.get(loose(name))
        if caption := marked or plain:
            found[name] = caption
    return found


def is_metadata(name: str) -> bool:
    """Whether a file of this name, without its folder, is one of captions by its name."""
    return stem(name).lower() == METADATA_STEM and _suffix(name) in METADATA_SUFFIXES


def _leads_nowhere(path: str) -> str:
    """What is said of a link to what is not there, as to a folder on a disk that is not connected; else ""."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    return f"a link to {display(os.readlink(path))}, which is not there: connect its disk, or remove the link"


def _placeholder(name: str) -> tuple[str, str]:
    """The name of the file for which `name` stands, and why that is not here; ("", "") for any other name."""
    if not name.endswith(_PLACEHOLDER_ENDS):
        return "", ""
    for pattern, why in _PLACEHOLDERS:
        if match := pattern.fullmatch(name):
            return match[1], why
    return "", ""


def _why_no_text(name: str, names: list[str], elsewhere: dict[str, str]) -> str:
    """Why the sound `name` has no caption, where a sync tool keeps that elsewhere: "song.txt is kept ..."; else ""."""
    for text in (f"{stem(name)}{CAPTION_END}.txt", f"{stem(name)}.txt", f"{name}.txt"):
        if why := elsewhere.get(loose(text)):
            return f"{display(text)} is {why}"
    for document in (stem(name) + suffix for suffix in GOOGLE_DOCUMENTS):
        if document in names:
            return f"{display(document)} holds a link to a Google document and no text: download it as plain text"
    return ""


def _melodies_elsewhere(elsewhere: dict[str, str]) -> dict[str, str]:
    """Why the melody of a sound is not here, where a sync tool keeps it elsewhere: by the sound's name without its
    suffix, as `loose` has it."""
    melodies = {stem(real): real for real in elsewhere if _suffix(real) in SOUND_SUFFIXES}
    return {
        own.removesuffix(MELODY_END): f"{display(real)} is {elsewhere[real]}"
        for own, real in melodies.items() if own.endswith(MELODY_END)
    }  # fmt: skip


def stem(name: str) -> str:
    """A name without its last suffix: v1.2 of v1.2.wav."""
    return os.path.splitext(name)[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def loose(name: str) -> str:
    """A name as macOS and Windows compare names: accents are composed with their letter, and case is ignored."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK_NAMES
