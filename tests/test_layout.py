"""The house: which module may import which, and how long files and lines may be."""
import ast
import glob
import os

import pytest
from conftest import ROOT

LIMITS = {'train.py': 420, 'model.py': 300, 'sample.py': 180, 'configurator.py': 60}
MODULE_LIMIT = 300
TEST_LIMIT = 600
COLUMNS = 100


def list_sources():
    """The Python files of the repository, relative to its root."""
    folders = ('', 'runtime', 'config', 'data', 'data/*', 'recipes', 'recipes/*', 'tests')
    paths = [path for folder in folders for path in glob.glob(os.path.join(ROOT, folder, '*.py'))]
    return sorted(os.path.relpath(path, ROOT) for path in paths)


SOURCES = list_sources()
SCRIPTS = [path for path in SOURCES if os.sep not in path
           and path not in ('model.py', 'configurator.py')]
MODULES = [path for path in SOURCES if os.sep not in path or path.startswith('runtime')]


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def list_imports(source, names):
    """[(path of the module of ours that is imported, whether inside a function)] in a source.

    names is {module name: path} of our modules.
    """
    found = []

    def visit(node, in_function):
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef,
                                                      ast.Lambda))
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'line {node.lineno}: a relative import'
            modules = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        found.extend((names[module], in_function) for module in modules if module in names)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(source), False)
    return found


def name_of(path):
    return path.removesuffix('.py').replace(os.sep, '.')


NAMES = {name_of(path): path for path in MODULES}
IMPORTS = {path: list_imports(read(path), NAMES) for path in MODULES}


def test_all_of_the_house_is_seen():
    assert {'train.py', 'sample.py', 'bench.py', 'convert.py', 'plot.py'} <= set(SCRIPTS)
    assert len(MODULES) > 20 and len(SOURCES) > 60
    assert os.path.join('runtime', 'kernels.py') in [path for path, _ in IMPORTS['train.py']]


@pytest.mark.parametrize('path', MODULES)
def test_layers(path):
    """Scripts stand on model.py and runtime/, and neither imports a script or the other."""
    for imported, in_function in IMPORTS[path]:
        if path.startswith('runtime'):
            assert imported.startswith('runtime'), f'{path} imports {imported}'
        elif path == 'model.py':
            assert imported.startswith('runtime') and in_function, f'{path} imports {imported}'
        else:  # train.py draws its picture by plot.py
            allowed = imported not in SCRIPTS or (path, imported) == ('train.py', 'plot.py')
            assert allowed, f'{path} imports {imported}'
            assert not in_function, f'{path} imports {imported} inside a function'


def test_no_import_of_ours_is_hidden_in_a_function_but_model_pys_two():
    hidden = {path for path in MODULES if any(in_function for _, in_function in IMPORTS[path])}
    assert hidden <= {'model.py'}
    tree = ast.parse(read('model.py'))
    functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                 and list_imports(ast.unparse(node), NAMES)]
    assert sorted(functions) == ['from_pretrained', 'generate']


def find_circle(imports, path, way):
    """The paths of an import circle that is reached from path; None if there is none."""
    for imported, _ in imports[path]:
        if imported in way:
            return [*way[way.index(imported):], imported]
        circle = find_circle(imports, imported, [*way, imported])
        if circle:
            return circle


@pytest.mark.parametrize('path', MODULES)
def test_no_import_circles(path):
    assert find_circle(IMPORTS, path, [path]) is None


def test_circles_are_found():
    circle = {'a': [('b', False)], 'b': [('c', True)], 'c': [('b', False)]}
    assert find_circle(circle, 'a', ['a']) == ['b', 'c', 'b']
    assert list_imports('def f():\n    import a\nfrom x import y', {'a': 1, 'x.y': 2}) == [
        (1, True), (2, False)]


def test_signals_do_not_need_distributed():
    assert IMPORTS[os.path.join('runtime', 'signals.py')] == []


@pytest.mark.parametrize('path', SOURCES)
def test_sizes(path):
    lines = read(path).splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert not wide, f'{path} has more than {COLUMNS} columns in the lines {wide}'
    limit = LIMITS.get(path, TEST_LIMIT if path.startswith('tests') else MODULE_LIMIT)
    assert len(lines) <= limit, f'{path} has {len(lines)} lines, more than {limit}'


@pytest.mark.parametrize('path', SOURCES)
def test_no_conditional_expression_inside_another_or_inside_an_f_string(path):
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, (ast.IfExp, ast.JoinedStr)):
            inner = [n.lineno for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
            assert not inner, f'{path}, lines {inner}'
