"""Write docs/elastic.md: save under each strategy on 2 ranks, resume under each on 1 to 4, compare the losses.

python -m tests.ranks.elastic_matrix

From the repository's root; about ten minutes on two cores. The tests do the same cell by cell.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tests.ranks.cases import Numbers, differences, steps
from tests.ranks.harness import run_ranks
from tests.ranks.test_elastic import RESUMED, SAVED
from tests.rounding import LOSS, NORM

FILE = Path(__file__).resolve().parents[2] / "docs" / "elastic.md"
SAVED_AFTER, FURTHER = 5, 5
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")

PAGE = """# Checkpoints that outlive the cluster

{further} steps after a checkpoint, against the same steps of one undisturbed process. Saved after step {saved_after}
under the column's strategy on 2 ranks; resumed, without any flag, under the row's strategy on 1 to 4 ranks. A cell
reads: largest difference of the losses, largest relative difference of the gradient norms. Allowed are {loss:.1e} and
{norm:.1e}, the rounding of float32 sums in another order; **bold** would be more. Largest found: {largest_loss:.1e} and
{largest_norm:.1e}.

{table}

Saved and resumed in the same layout, against that layout's own undisturbed run:
{same}.

Stereo and melody models continue in the same way (`tests/ranks/test_kinds.py`).

{cells} resumed runs of the debug model (2.7 M parameters) on ragged clips, some without captions, global batch 8,
learning rate 1e-3, float32. {date}, {hardware};
{versions}.
Made by `python -m tests.ranks.elastic_matrix`.
"""

Cells = dict[tuple[str, str, int], tuple[float, float]]


def main() -> int:
    """Run all cells and write the page; 1 where a cell is beyond what is allowed."""
    undisturbed = {"single": last_steps(run_ranks(1, steps, "single", 1)[0])}
    cells: Cells = {}
    same = {}
    with tempfile.TemporaryDirectory() as root:
        for before in SAVED:
            folder = os.path.join(root, before)
            run_ranks(2, steps, before, 1, count=SAVED_AFTER, folder=folder, save_at=SAVED_AFTER)
            undisturbed[before] = last_steps(run_ranks(2, steps, before, 1)[0])
            for after, world_size in RESUMED:
                found = run_ranks(world_size, steps, after, 1, count=FURTHER, folder=folder)[0]
                assert len(found.losses) == FURTHER, "it did not resume"
                cells[before, after, world_size] = loss, norm = differences(found, undisturbed["single"])
                print(f"{before} on 2 -> {after} on {world_size}: {loss:.1e}, {norm:.1e}", flush=True)
                if (after, world_size) == (before, 2):
                    same[before] = differences(found, undisturbed[before]) == (0.0, 0.0)
    FILE.write_text(page(cells, same), encoding="utf-8")
    print(f"wrote {FILE}")
    allowed = all(loss <= LOSS and norm <= NORM for loss, norm in cells.values())
    return 0 if allowed and all(same.values()) else 1


def last_steps(whole: Numbers) -> Numbers:
    """What an undisturbed run gives for the steps that a resumed one takes."""
    steps_taken = slice(SAVED_AFTER, SAVED_AFTER + FURTHER)
    return Numbers(losses=whole.losses[steps_taken], norms=whole.norms[steps_taken])


def page(cells: Cells, same: dict[str, bool]) -> str:
    """The whole page, in Markdown."""
    head = "| resumed under | " + " | ".join(f"{before} on 2" for before in SAVED) + " |"
    rows = [
        f"| {after} on {world_size} | " + " | ".join(cell(*cells[before, after, world_size]) for before in SAVED) + " |"
        for after, world_size in RESUMED
    ]
    return PAGE.format(
        further=FURTHER,
        saved_after=SAVED_AFTER,
        loss=LOSS,
        norm=NORM,
        largest_loss=max(loss for loss, _ in cells.values()),
        largest_norm=max(norm for _, norm in cells.values()),
        table="\n".join([head, "|---" * (1 + len(SAVED)) + "|", *rows]),
        same=", ".join(f"{name} {'bit-equal' if equal else '**differs**'}" for name, equal in same.items()),
        cells=len(cells),
        date=date.today().isoformat(),
        hardware=f"{os.cpu_count()} CPU cores ({platform.machine()}), gloo",
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )


def cell(loss: float, norm: float) -> str:
    """Both differences, bold where they are beyond what is allowed."""
    text = f"{loss:.1e}, {norm:.1e}"
    return text if loss <= LOSS and norm <= NORM else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
