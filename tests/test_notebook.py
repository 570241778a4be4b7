"""docs/musicgen.ipynb: it is clean as it lies there, and runs from its first cell to its last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import environ, few_clips

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/musicgen.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_holds_no_output_of_anybody() -> None:
    codes = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert codes and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)


def test_its_settings_are_one_cell_that_a_test_can_replace() -> None:
    assert [cell["metadata"].get("tags") for cell in cells() if cell["metadata"].get("tags")] == [["parameters"]]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_it_goes_from_a_folder_to_a_page_and_a_second_time_trains_nothing_again(tmp_path, monkeypatch) -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in environ().items():
        monkeypatch.setenv(name, value)
    few_clips(tmp_path / "music")

    def run() -> str:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        [settings] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        settings.source += f"""
MUSIC, OUTPUT, PROJECT = {str(tmp_path / "music")!r}, {str(tmp_path / "drive")!r}, {str(ROOT)!r}
MODEL = "debug"
TRAINING = ["--max_steps", "4", "--sample_every", "2", "--sample_seconds", "1", "--validation", "0.4"]
SECONDS = 1
"""
        client.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
        nbformat.validate(notebook)
        return "".join(
            output.get("text", "") + str(output.get("data", {}).get("text/html", "")) for cell in notebook.cells
            if cell.cell_type == "code" for output in cell.outputs
        )  # fmt: skip

    said = run()
    made = tmp_path / "drive"
    assert (made / "run/huggingface/model.safetensors").is_file() and (made / "dataset/dataset.html").is_file()
    assert "generated/comparison.html" in said and "Nothing is shared." in said
    assert {sound.parent.name for sound in (made / "generated").glob("*/*.wav")} == {"base", "tuned"}
    assert json.loads((made / "run/recall.json").read_text())["played_back"]
    assert said.count("<iframe srcdoc=") == 4
    metrics = (made / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(made / "generated")
    assert "step 3" not in run() and (made / "run/metrics.jsonl").read_bytes() == metrics
