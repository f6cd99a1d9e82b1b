"""The notebooks run from top to bottom, what they assert holds, and their stored output is true."""
import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NAMES = ['transformer_sizing', 'scaling_laws']


def read(name):
    return nbformat.read(os.path.join(ROOT, f'{name}.ipynb'), as_version=4)


def list_texts(notebook):
    """The lines that the cells print. The size of a real file differs between versions of torch."""
    return [line for cell in notebook.cells for output in cell.get('outputs', [])
            for line in output.get('text', '').splitlines() if not line.startswith('a real')]


@pytest.mark.parametrize('name', NAMES)
def test_notebook(name):
    path = os.path.join(ROOT, f'{name}.ipynb')
    assert os.path.getsize(path) < 200_000  # the outputs are small
    notebook = read(name)
    assert any('assert ' in cell.source for cell in notebook.cells)
    lines = [line for cell in notebook.cells for line in cell.source.splitlines()]
    assert max(map(len, lines)) <= 100
    NotebookClient(notebook, timeout=120, kernel_name='python3',
                   resources={'metadata': {'path': ROOT}}).execute()
    assert list_texts(notebook) == list_texts(read(name))


def test_the_projection_in_the_docs_is_the_notebooks():
    with open(os.path.join(ROOT, 'docs', 'scaling.md'), encoding='utf-8') as f:
        page = f.read()
    table = read('transformer_sizing').cells[-1].outputs[0].text
    assert table.count('\n') == 14 and table in page
