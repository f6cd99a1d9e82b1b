"""The packages that the project names, for pip and for uv."""
import ast
import glob
import os
import re
import sys

import pytest
from conftest import ROOT

tomllib = pytest.importorskip('tomllib', reason='Python 3.11 has it')


def read_requirements(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        lines = [line.strip() for line in f]
    return [line for line in lines if line and not line.startswith(('#', '-r'))]


def read_project():
    with open(os.path.join(ROOT, 'pyproject.toml'), 'rb') as f:
        return tomllib.load(f)


def test_pip_and_uv_install_the_same_packages():
    project = read_project()
    assert project['project']['dependencies'] == read_requirements('requirements.txt')
    assert project['dependency-groups']['dev'] == read_requirements('requirements-dev.txt')
    assert project['tool']['uv']['package'] is False  # there is nothing to build


def list_imports(path):
    """The packages that a file imports."""
    with open(path, encoding='utf-8') as f:
        nodes = list(ast.walk(ast.parse(f.read())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split('.')[0] for name in names}


def test_what_the_code_imports_is_installed():
    """Every package that a script or a module imports is named, or comes with one that is."""
    named = {re.split(r'[=<>]', line)[0] for line in read_requirements('requirements.txt')}
    assert {'transformers', 'datasets'} <= named
    brought = {'safetensors', 'tokenizers', 'huggingface_hub', 'pyarrow'}  # by these two
    patterns = ('*.py', 'runtime/*.py', 'data/*.py', 'data/*/*.py')
    paths = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern))]
    ours = {os.path.basename(path).removesuffix('.py') for path in paths} | {'runtime'}
    imported = set().union(*map(list_imports, paths))
    assert imported - ours - sys.stdlib_module_names <= named | brought
