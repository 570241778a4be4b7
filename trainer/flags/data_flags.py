"""The flags that say which clips a run has, how they are encoded, and what their captions are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from trainer.flags.flag import Flag
from trainer.spec.caption_sources import SOURCES_IN_WORDS
from trainer.spec.trigger import Place

data = partial(Flag, "data")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The section "data" of the flags; `Config` has all sections."""

    dataset_path: Annotated[
        str,
        data(
            "Folder of audio files and their captions: song.mp3, song.txt; a .parquet file or a folder of them, or of "
            "datasets' save_to_disk; or, where there is no such path, a data set of the Hugging Face hub: user/name.",
            aliases=("dataset",),
            path=True,
        ),
    ]
    dataset_config: Annotated[
        str | None, data("Configuration of a data set of the hub or of tables; none: the only one, or its default.")
    ] = None
    dataset_split: Annotated[str, data("Split of a data set of the hub or of tables that is used.")] = "train"
    dataset_revision: Annotated[
        str | None,
        data("Branch, tag or commit of a data set of the hub; none: main, and on resuming the commit it began with."),
    ] = None
    audio_column: Annotated[
        str | None, data("Column of tables with the sounds; none: the one that holds some.")
    ] = None
    no_label: Annotated[bool, data("Train without captions; none are needed.")] = False
    segment_seconds: Annotated[float, data("Seconds of a training crop.", least=1, most=300)] = 30.0
    min_seconds: Annotated[
        float, data("Files shorter than this many seconds are left out.", above=0, most=300)
    ] = 0.5
    trim_silence: Annotated[
        bool, data("Leave out what is below -60 dBFS at both ends of each file; --min_seconds holds for what is left.")
    ] = False
    loudness: Annotated[
        float | None,
        data(
            "Bring each file to this integrated loudness in LUFS (ITU-R BS.1770), as in -14; less where its peak would "
            "pass full scale; none: each as loud as it is.",
            least=-60,
            most=-5,
        ),
    ] = None
    sample_by: Annotated[
        Literal["file", "duration"],
        data("Crops of a file in an epoch. file: one; duration: as many as segments fit into it, at least one."),
    ] = "file"
    validation: Annotated[
        str,
        data("What to validate on: a share of the files (0.1: a tenth, 0: none), or what --dataset takes.", path=True),
    ] = "0"
    validation_split: Annotated[
        str | None,
        data("Split of the data set that --validation names, which may be --dataset's own; none: --dataset_split."),
    ] = None
    cache_dir: Annotated[str, data("Folder for encoded audio and captions; runs may share it.", path=True)] = "cache"
    code_views: Annotated[
        int, data("Offsets inside a codec frame at which each file is encoded.", least=1, most=640)
    ] = 4
    word_dropout: Annotated[
        float,
        data("Share of a caption's words left out while training; Meta trained with 0.3.", least=0, below=1),
    ] = 0.0
    caption_variants: Annotated[
        int,
        data(
            "With --word_dropout or --merge_metadata: variants of each caption; each epoch draws one.",
            least=1,
            most=1000,
        ),
    ] = 8
    caption_lines: Annotated[
        bool, data("Each line of a .txt is a caption, one of which is drawn each epoch; 0: all lines are one.")
    ] = False
    trigger: Annotated[
        str | None,
        data("A phrase that is put into every caption that lacks it, as in 'in my-style'; none: captions as they are."),
    ] = None
    trigger_place: Annotated[Place, data("With --trigger: where in a caption the phrase is put.")] = "before"
    captions: Annotated[
        str,
        data(
            "Where captions are looked for, and in which order; the first that has one counts. text: song.caption.txt, "
            "song.txt; metadata: metadata.csv, .jsonl, .parquet; json: song.json; template: --caption_template."
        ),
    ] = SOURCES_IN_WORDS
    caption_column: Annotated[
        str | None,
        data("Column of metadata files and tables with the captions; none: text, caption, description or prompt."),
    ] = None
    caption_template: Annotated[
        str | None,
        data(
            "Caption made of a file's tags and names for files that have none, as in '{genre}, {title}, {folder}'; "
            "none: no such captions."
        ),
    ] = None
    default_caption: Annotated[str | None, data("Caption of files for which no other is found; none: left out.")] = None
    caption: Annotated[
        str | None, data("The caption of every file; no caption file is read. none: captions are looked for.")
    ] = None
    merge_metadata: Annotated[
        float,
        data(
            "Share of a caption's variants that get what a .json or metadata file, or a table's row, says of genre, "
            "bpm, key, moods, keywords and instrument; Meta trained with 0.25.",
            least=0,
            most=1,
        ),
    ] = 0.0
    merge_drop_caption: Annotated[
        float, data("With --merge_metadata: share of those variants that lose the caption itself.", least=0, most=1)
    ] = 0.0
    merge_drop_field: Annotated[
        float, data("With --merge_metadata: share of their genre, bpm and so on that is left out.", least=0, most=1)
    ] = 0.0
    rehash: Annotated[
        bool, data("Read every file to see whether it changed, instead of its size and date.")
    ] = False
