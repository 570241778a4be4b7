"""Draft captions for the sound files of a folder that have none, for people to read and mend.

python scripts/caption.py my_music --dry_run

Writes song.caption.txt beside song.wav, from its tags, its name and folder, and the tempo and key that are heard in it.
Files that have a caption are left alone. docs/drafting_captions.md says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from captioning.draft import LEAST_CONFIDENCE, TEMPLATE, Draft, Part, draft_of, has_caption
from captioning.record import Record

from trainer.data import caption_template
from trainer.data.audio import AudioFault
from trainer.data.caption_files import LYRICS_ALONE
from trainer.data.caption_settings import CaptionSettings
from trainer.data.caption_sources import CaptionReader
from trainer.data.fates import Fate, display
from trainer.data.folder_walk import Sound, walk
from trainer.data.manifest import check_folder
from trainer.errors import StorageError, TrainerError, exit_code_of

SAVE_EVERY = 100  # drafts, after which it is kept which they are
DRAFTED, CAPTIONED, BLANK, FAULTY = "drafted", "with a caption already", "of which nothing is known", "not readable"


def main(argv: Sequence[str]) -> int:
    """Draft captions as the flags say; returns the exit code."""
    flags = parsed(argv)
    try:
        caption_template.check(flags.template)
        check_folder(os.fspath(flags.folder))
        counts = draft_all(flags)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    print(closing(counts, flags))
    return 0


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="caption.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of sound files, searched with all folders in it")
    parser.add_argument("--dry_run", action="store_true", help="show the drafts and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="draft anew what was drafted here and not changed")
    parser.add_argument(
        "--template", default=TEMPLATE, help=f"default: '{TEMPLATE}'; names: {', '.join(caption_template.NAMES)}"
    )
    parser.add_argument(
        "--least_confidence", type=_share, default=LEAST_CONFIDENCE, metavar="SHARE",
        help=f"leave out a tempo, a key or words of CLAP that are less sure, 0 to 1; default: {LEAST_CONFIDENCE}",
    )  # fmt: skip
    parser.add_argument(
        "--clap", metavar="MODEL", help="also ask a CLAP model, a hub id (laion/clap-htsat-unfused) or a folder, for "
        "genre, instruments and mood",
    )  # fmt: skip
    return parser.parse_args(argv)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("a number from 0 to 1 is needed")
    return share


def draft_all(flags: argparse.Namespace) -> Counter[str]:
    """Draft and print one file after the other; how many files had which outcome.

    Raises StorageError where a draft cannot be written, ModelError where CLAP cannot be loaded.
    """
    root, counts = Path(flags.folder), Counter[str]()
    record = Record(root)
    zero_shot = None
    if flags.clap is not None:
        from captioning.zero_shot import ZeroShot

        zero_shot = ZeroShot(flags.clap)
    try:
        for sound, captioned in sounds_of(root):
            target = target_of(root, sound.name)
            mine = record.is_unchanged_draft(target)
            if not (mine and flags.overwrite) and captioned:
                counts[CAPTIONED] += 1
                continue
            try:
                heard: tuple[Part, ...] = () if zero_shot is None else zero_shot.parts_of(root / sound.name)
                draft = draft_of(root, sound.name, flags.template, heard, flags.least_confidence)
            except AudioFault as fault:
                counts[FAULTY] += 1
                print(f"{display(sound.name)}\n    skipped: {fault.detail}")
                continue
            print(shown(sound.name, draft))
            counts[DRAFTED if draft.caption else BLANK] += 1
            if draft.caption and not flags.dry_run:
                _write(record, target, draft.caption)
                if counts[DRAFTED] % SAVE_EVERY == 0:
                    record.save()
    finally:
        if counts[DRAFTED] and not flags.dry_run:
            record.save()
    return counts


def sounds_of(root: Path) -> Iterator[tuple[Sound, bool]]:
    """The sound files below `root` that the trainer reads, and whether each has a caption, or a broken one.

    What else looks like sound is named.
    """
    found = list(walk(os.fspath(root)))
    reader = CaptionReader(os.fspath(root), (item for item in found if not isinstance(item, Fate)), CaptionSettings())
    for item in found:
        if isinstance(item, Sound):
            caption = reader.caption_of(item)
            if isinstance(caption, Fate) and LYRICS_ALONE in caption.detail:
                yield item, os.path.lexists(target_of(root, item.name))
                continue
            has_none = isinstance(caption, Fate) and caption.fate == "no caption"
            yield item, not has_none or has_caption(root, item.name, item.caption_name)
        elif isinstance(item, Fate) and item.fate in ("unsupported format", "unreadable"):
            print(f"{item.path}\n    skipped: {item.detail}")


def target_of(root: Path, name: str) -> Path:
    """The file into which the caption of a sound is drafted."""
    return root / (os.path.splitext(name)[0] + ".caption.txt")


def shown(name: str, draft: Draft) -> str:
    """A draft with the source of each part, as the console shows it."""
    lines = [display(name)]
    lines.append(f"    {draft.caption}" if draft.caption else "    nothing is known of it: write a caption by hand")
    if draft.parts:
        lines.append("      from: " + "; ".join(part.describe() for part in draft.parts))
    if draft.left_out:
        lines.append("      too unsure: " + "; ".join(part.describe() for part in draft.left_out))
    if draft.is_short:
        lines.append("      under 15 s: too short to hear tempo and key")
    return "\n".join(lines)


def closing(counts: Counter[str], flags: argparse.Namespace) -> str:
    """What was done, and what is to be done now."""
    known = ", ".join(f"{counts[kind]:,} {kind}" for kind in (DRAFTED, CAPTIONED, BLANK, FAULTY) if counts[kind])
    lines = [f"\n{known or 'no sound files'}."]
    if counts[DRAFTED] and flags.dry_run:
        lines.append("Nothing was written: without --dry_run each draft goes into NAME.caption.txt beside its sound.")
    elif counts[DRAFTED]:
        lines.append("Read the .caption.txt files and mend them before you train: drafts guess, and a model learns "
                     "what they say. What you change is never overwritten.")
    return "\n".join(lines)


def _write(record: Record, target: Path, caption: str) -> None:
    try:
        record.write(target, caption)
    except OSError as error:
        raise StorageError(
            f"{display(target)} cannot be written ({error.strerror}): free space there or permit writing; drafts "
            "written before are kept, and the next call goes on behind them"
        ) from error


if __name__ == "__main__":
    for console in (sys.stdout, sys.stderr):
        console.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names and tags in ASCII
    sys.exit(main(sys.argv[1:]))
