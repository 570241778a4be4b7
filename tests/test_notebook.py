"""docs/musicgen.ipynb: it is clean as it lies there, and runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environ, few_clips
from trainer.spec.recipes import LORA, RECIPES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/musicgen.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_holds_no_output_of_anybody() -> None:
    codes = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert codes and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)


def test_its_settings_are_one_cell_that_a_test_can_replace() -> None:
    assert [cell["metadata"].get("tags") for cell in cells() if cell["metadata"].get("tags")] == [["parameters"]]


def test_its_training_is_that_of_the_recipes() -> None:
    settings: dict[str, str] = {}
    exec("".join(cells()[2]["source"]), settings)  # the cell with the tag "parameters", which only sets names
    [recipe] = [one for one in RECIPES if one.mode == LORA and one.music.name == "2 hours"]
    assert ["--model_id", settings["MODEL"], *shlex.split(settings["TRAINING"])] == recipe.flags("small")


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_stop_button_saves_the_run_and_leaves_nothing_running(tmp_path: Path) -> None:
    """The button interrupts the whole process group of the kernel, in which this runs the cells as a program."""
    few_clips(tmp_path / "music")
    codes = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    [training] = [code for code in codes if code.startswith("training = ")]
    [start] = [code for code in codes if "launch.py\", *training)" in code]
    settings = f"""
MUSIC, OUTPUT, PROJECT = {str(tmp_path / "music")!r}, {str(tmp_path / "drive")!r}, {str(ROOT)!r}
MODEL, TRAINING = "debug", "--epochs 100000"
"""
    cut = training[: training.index("do(")] + f"python = {sys.executable!r}"
    program = "\n".join([codes[0], settings, codes[1], cut, start])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ(),
        start_new_session=True, cwd=tmp_path,
    ) as cell:  # fmt: skip
        assert cell.stdout is not None
        said = b""
        while b" 3/" not in said:
            more = cell.stdout.read1(65536)
            assert more, said.decode()
            said += more
        os.killpg(cell.pid, signal.SIGINT)
        said += cell.stdout.read()
    assert b"has saved its state: run this cell again" in said and cell.returncode == 0, said.decode()
    assert (tmp_path / "drive/run/exit_code").read_text().strip() == "75"
    assert list((tmp_path / "drive/run/checkpoints").glob("step-*"))


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
TRAINING = "--max_steps 4 --sample_every 2 --sample_seconds 1 --validation 0.4"
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
