"""The notebooks run from top to bottom, and what they assert holds."""
import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


@pytest.mark.parametrize('name', ['transformer_sizing', 'scaling_laws'])
def test_notebook(name):
    path = os.path.join(ROOT, f'{name}.ipynb')
    assert os.path.getsize(path) < 200_000  # the outputs are small
    notebook = nbformat.read(path, as_version=4)
    assert any('assert ' in cell.source for cell in notebook.cells)
    NotebookClient(notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': ROOT}}).execute()
