"""From the flags to the page that shows the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data import fates
from trainer.data.inventory import fates_of
from trainer.errors import DataError, StorageError, TrainerError
from trainer.report import report
from trainer.report.settings import ReportSettings
from trainer.wiring.data import caption_settings, treatment

if TYPE_CHECKING:
    from trainer.data.inventory import ScannedFolder, UnusableDataError
    from trainer.engine import Ranks
    from trainer.flags.config import Config
    from trainer.model.source import Source
    from trainer.run.output_dir import OutputDir


def report_settings(config: Config, *, embed: bool = False) -> ReportSettings:
    """What the report of the dataset must know of the run, and whether it holds excerpts of the sounds."""
    return ReportSettings(
        validation_share=config.validation_share,
        seed=config.seed,
        captions=caption_settings(config),
        treatment=treatment(config),
        segment_seconds=config.segment_seconds,
        model=config.model_id,
        embed=embed,
    )


def shown_on_page(
    error: UnusableDataError,
    config: Config,
    folder: OutputDir,
    source: Source,
    ranks: Ranks,
    *,
    resumes: bool,
) -> TrainerError:
    """The error with the name of the page that shows the dataset, which is written on the first process."""
    if not ranks.is_first:
        ranks.wait("the page of a dataset that cannot be used")  # the first process ends the run once it is written
    if not error.folders:
        return error
    page = report_dataset(config, folder, source, error.folders)
    if not resumes:  # else the report says what the checkpoint was trained on, and stays
        fates.write_report(fates_of(error.folders), folder.report)
        page = page or folder.report
    return error if page is None else DataError(f"{error}\nWhat became of every file, and what to do: {page}")


def report_dataset(config: Config, folder: OutputDir, source: Source, folders: Sequence[ScannedFolder]) -> Path | None:
    """Write the page that shows the dataset, unless it is there already; returns it. A page that cannot be written ends
    no run: None then."""
    try:
        settings = report_settings(config)
        report.write(folders, settings, folder.root, load_tokenizer=source.load_tokenizer)
    except (OSError, StorageError, ImportError) as error:
        print(f"warning: {report.PAGE} could not be written: {error}")
        return None
    return folder.root / report.PAGE
