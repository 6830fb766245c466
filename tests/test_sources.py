"""What the sources may not do: turn data into code."""

import ast
import builtins
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("bitnet_jax", "experiments", "sweeps", "analysis")

# Modules that make objects of any class from bytes, or run a text.
MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code",
    "codeop", "runpy", "yaml", "pty", "torch.serialization",
}  # fmt: skip
# Calls by the last part of their name, and by more of it where the last part is a common word.
CALLS = {"exec", "eval", "compile", "__import__", "exec_module", "system", "popen", "unpickle",
         "read_pickle", "import_module", "literal_eval", "extractall",
         "unpack_archive"}  # fmt: skip
QUALIFIED = {"np.load", "numpy.load", "jnp.load", "torch.load", "torch.hub.load", "pandas.eval",
             "pd.eval", "yaml.load", "wheel.extract"}  # fmt: skip

# Where they stand, and why they may.
ALLOWED = {
    # A config file is Python, which the README says.
    ("experiments/plan.py", "spec.loader.exec_module"),
    # Held against a list of syntax nodes before: no calls, attributes or indexing.
    ("analysis/tables.py", "frame.eval"),
    # Literals alone, by its definition.
    ("experiments/command_line.py", "ast.literal_eval"),
    # One of the peers that the command line may choose from, by a table.
    ("experiments/benchmark/peers/__init__.py", "importlib.import_module"),
    # Packages that an export needs, by names that stand in the sources of bitnet_jax/export.
    ("bitnet_jax/export/packages.py", "importlib.import_module"),
    # What llama-cpp-python calls a forward pass.
    ("bitnet_jax/export/gguf.py", "engine.eval"),
    # Writes manifests, and reads none.
    ("experiments/launch/k8s.py", "import yaml"),
    # With allow_pickle=False, see below.
    ("bitnet_jax/data/corpus.py", "np.load"),
}


def calls(tree):
    """(name as written, call) of every call; what a method's object is, if no name, is `()`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        parts, f = [], node.func
        while isinstance(f, ast.Attribute):
            parts.append(f.attr)
            f = f.value
        parts.append(f.id if isinstance(f, ast.Name) else "()")
        yield ".".join(reversed(parts)), node


def suspicious(text):
    """What a source does that it might not: (name, line)."""
    tree = ast.parse(text)
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(f"import {n}", node.lineno) for n in names if _is_module(n)]
    for name, node in calls(tree):
        last = name.rpartition(".")[2]
        # .compile() of a lowered program or of re makes no code of data; the builtin does.
        if (last in CALLS and not (last == "compile" and name != last)) or name in QUALIFIED:
            found.append((name, node.lineno))
        if any(k.arg == "shell" for k in node.keywords) or any(
            k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False
            for k in node.keywords
        ):
            found.append((f"{name}(shell or allow_pickle)", node.lineno))
    return found


def _is_module(name):
    return name in MODULES or name.partition(".")[0] in MODULES


def sources():
    return sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))


def undefined(text):
    """Names that a module reads and nothing defines. Style and type checkers are told not to look,
    since jaxtyping's axes look like names to them."""
    module = symtable.symtable(text, "module", "exec")
    known = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    known |= {*dir(builtins), "__file__", "__doc__"}
    scopes = [module]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            here = scope is module or symbol.is_global()
            if here and symbol.is_referenced() and symbol.get_name() not in known:
                yield symbol.get_name()


def test_every_name_is_defined():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    for path in [*sources(), *tests]:
        assert list(undefined(path.read_text())) == [], path
    assert list(undefined("def f():\n    return os.devnull, len")) == ["os"]
    assert list(undefined("import os\nx: 'Float[Array, \"B\"]' = os.devnull\n")) == []


def test_nothing_that_is_read_becomes_code():
    assert len(sources()) > 60
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sources()
        for name, _ in suspicious(path.read_text())
    }
    assert found == ALLOWED, "a new one needs a reason, a gone one must leave the list"


def test_arrays_are_loaded_without_pickles():
    """NumPy's default is that, too, since 1.16.3; said, it holds whatever wraps it."""
    for path in sources():
        for name, node in calls(ast.parse(path.read_text())):
            if name in QUALIFIED:
                said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert said.get("allow_pickle") is False, (path, node.lineno)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "from torch import serialization",
        "eval('1')",
        "builtins.exec(text)",
        "compile(text, '', 'exec')",
        "os.system('x')",
        "np.load(path)",
        "x = torch.load(path)",
        "yaml.load(text)",
        "subprocess.run('x', shell=True)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "zipfile.ZipFile(path).extractall(folder)",
        "importlib.import_module(name)",
    ],
)
def test_the_scan_sees(text):
    assert suspicious(text)


@pytest.mark.parametrize("text", ["re.compile('x')", "lowered.lower(x).compile()", "json.load(f)"])
def test_the_scan_lets_pass(text):
    assert suspicious(text) == []
