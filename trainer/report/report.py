"""The report of a dataset: dataset.json with all figures, and dataset.html, which shows them and plays the sounds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.atomic import write_whole
from trainer.data.fates import display
from trainer.data.garbage_collection import put_off
from trainer.data.inventory import ScannedFolder
from trainer.report.figures import figures_of
from trainer.report.mending import mend_first
from trainer.report.rows import Row, rows_of
from trainer.report.settings import ReportSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.report.excerpts import Sample

FIGURES, PAGE = "dataset.json", "dataset.html"
FORMAT, VERSION = "musicgen-trainer dataset report", 1  # raised where a reader of dataset.json must be changed
HEAD_BYTES = 400  # in which the digest stands


@put_off()
def write(
    folders: Sequence[ScannedFolder], settings: ReportSettings, report_folder: Path, *,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase] | None,
) -> dict[str, Any] | None:
    """Write both files; returns what dataset.json holds, or None where it describes just this already.

    A run calls this at each start. Nothing is counted, drawn or written where nothing changed.

    Raises OSError where a file cannot be written.
    """
    digest = _digest(folders, settings, has_tokenizer=load_tokenizer is not None)
    if _digest_there(report_folder) == digest and (report_folder / PAGE).is_file():
        return None
    from trainer.report.page import page_of  # jinja2, and then matplotlib

    rows = rows_of(folders, settings, report_folder, load_tokenizer() if load_tokenizer else None)
    validates = settings.validation_share > 0 or len(folders) > 1
    findings = mend_first(rows, no_label=settings.captions.no_label, validates=validates)
    report = {
        "format": FORMAT,
        "version": VERSION,
        "digest": digest,
        "folders": [display(folder.root) for folder in folders],
        "model": settings.model,
        "figures": figures_of(rows, has_tokens=load_tokenizer is not None),
        "mend_first": [finding.to_dict() for finding in findings],
        "files": [vars(row) for row in rows],
    }
    excerpts: Mapping[str, Sample] = {}
    if settings.embed:
        excerpts = _excerpts(folders, rows)
    report_folder.mkdir(parents=True, exist_ok=True)
    (report_folder / FIGURES).unlink(missing_ok=True)  # it would say that the page is up to date
    write_whole(report_folder / PAGE, page_of(report, rows, excerpts).encode())
    write_whole(report_folder / FIGURES, json.dumps(report, allow_nan=False).encode())
    return report


def _digest(folders: Sequence[ScannedFolder], settings: ReportSettings, *, has_tokenizer: bool) -> str:
    """Of all that the report depends on: equal contents have equal facts. The page's own files are among it, so that a
    newer version writes its page."""
    digest = hashlib.blake2b(repr((VERSION, settings, has_tokenizer)).encode(), digest_size=16)
    for name in ("page.html", "base.css", "page.css", "page.js"):
        digest.update((Path(__file__).parent / name).read_bytes())
    for folder in folders:
        fates = [(fate.path, fate.fate, fate.detail) for fate in folder.fates]
        files = [
            (one.path, one.caption, one.caption_source, one.caption_fields, one.facts.content)
            for one in folder.inspected
        ]
        digest.update(repr((folder.root, fates, files)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _digest_there(report_folder: Path) -> str:
    """The digest in dataset.json; "" where there is none."""
    try:
        with open(report_folder / FIGURES, "rb") as file:
            found = re.search(rb'"version": %d, "digest": "([0-9a-f]{32})"' % VERSION, file.read(HEAD_BYTES))
    except OSError:
        return ""
    return found[1].decode() if found else ""


def _excerpts(folders: Sequence[ScannedFolder], rows: Sequence[Row]) -> dict[str, Sample]:
    """Excerpts by the path that a row shows."""
    from trainer.report.excerpts import excerpts_of

    made = excerpts_of(folders)
    names: dict[str, Sample] = {}
    for number, folder in enumerate(folders):
        prefix = f"{display(folder.root)}/" if number else ""
        names |= {prefix + one.path: made[one.reference] for one in folder.inspected if one.reference in made}
    return {row.path: names[row.path] for row in rows if row.path in names}
