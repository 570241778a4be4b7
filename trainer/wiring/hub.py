"""The data sets of the hub that the flags name: found by one process, fetched by one of each machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data import hub_dataset, hub_parts
from trainer.preflight import check_prepared
from trainer.run.output_dir import HUB_DATASETS
from trainer.wiring.data import find_hub_datasets

if TYPE_CHECKING:
    from trainer.data.hub_dataset import HubDataset
    from trainer.engine import Ranks
    from trainer.flags.config import Config
    from trainer.run.checkpoint import Checkpoint
    from trainer.run.output_dir import OutputDir

# How long the other processes wait for the one that downloads. Not --timeout_minutes, which is about processes that do
# nothing: 13 GB take 4 hours at 1 MB/s.
DOWNLOAD_SECONDS = 6 * 3600


def find_on_hub(
    config: Config, folder: OutputDir, checkpoint: Checkpoint | None, ranks: Ranks
) -> Mapping[str, HubDataset]:
    """The data sets that are the hub's, as one process was told of them; a resumed run keeps its commits."""
    found: dict[str, HubDataset] = {}
    if ranks.is_first:
        found = find_hub_datasets(config, {} if checkpoint is None else folder.read_json(HUB_DATASETS))
        check_prepared(config, found)
    ranks.wait("asking the hub")
    found = ranks.gather(found)[0]
    for dataset in found.values():
        ranks.say(dataset.describe())
    return found


def fetch_datasets(config: Config, hub: Mapping[str, HubDataset], ranks: Ranks) -> dict[str, HubDataset]:
    """The data sets, fetched; or, where a machine's disk is too small, as ones of which `prepare` reads parts."""
    cache_dir, reasons, done = Path(config.cache_dir), dict[str, str](), dict(hub)
    look = partial(hub_parts.why_in_parts, hub, cache_dir)
    ranks.once_per_machine("looking at the disk", lambda: reasons.update(look()), limit_seconds=DOWNLOAD_SECONDS)
    for of_rank in ranks.gather(reasons):
        reasons = of_rank | reasons
    for name, found in hub.items():
        flag = f"--{name}"
        if name in reasons:
            hub_parts.check_flags(flag, found, rehash=config.rehash, template=config.caption_template)
            ranks.say(hub_parts.announcement(found, reasons[name], cache_dir))
            done[name] = replace(found, in_parts=True)
        else:
            fetch = partial(hub_dataset.fetch, found, flag)
            ranks.once_per_machine("fetching the data set", fetch, limit_seconds=DOWNLOAD_SECONDS)
    return done
