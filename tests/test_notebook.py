"""The notebook runs from top to bottom and shows what it says."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "dcgan_digits.ipynb"


def test_notebook_runs_and_shows_data_curves_samples_and_times(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGAN_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6  # real digits, two pairs of curves, samples of both ways, the walk
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "10,000 images of (1, 32, 32)" in printed
    assert "same parameters: True" in printed
    assert (tmp_path / "runs/notebook/checkpoint.pt").is_file()
