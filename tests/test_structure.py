"""The shape of the code base: who imports whom, what may be named how, what training must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("prep", "train", "eval", "kernels")
# What each folder may import of ours, with all below it, and what it may import inside a function only.
TRAINING = {"posmask.train", "posmask.kernels", "posmask.prep.pos", "posmask.prep.shards"}
ALLOWED = {
    "kernels": {"posmask.kernels"},
    "prep": {"posmask.prep"},
    "train": TRAINING,
    # What prepared the training data prepares photos, texts and answers of a benchmark: alike, and without spaCy.
    "eval": TRAINING | {"posmask.eval", "posmask.prep.images", "posmask.prep.wordpiece", "posmask.prep.answers"},
}
ALLOWED_LAZILY = {"eval": {"posmask.prep.tagging"}}
# A script's own folder comes first on its path, so such a file would replace the package for everybody it imports.
TAKEN = sys.stdlib_module_names | {
    "streaming", "datasets", "triton", "spacy", "deepspeed", "kernels", "torch", "torchvision", "numpy", "transformers",
    "tokenizers", "nvidia", "open_clip", "timm", "rich", "PIL", "pyarrow", "safetensors", "matplotlib", "tensorboard",
    "filelock", "ray", "wandb", "pytest", "hypothesis", "build", "posmask", *FOLDERS,
}  # fmt: skip
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def imports(tree: ast.AST, lazy: bool = False):
    """(full name, line, whether inside a function) of everything that a module imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import makes no sense in a script"
            # `from posmask.prep import pos` names a module, `from posmask.prep.pos import UPOS` something in one.
            yield from ((f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names)
        else:
            yield from imports(node, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(folder: str, source: str) -> list[str]:
    """Names that a module of this folder imports against the arrows."""
    found = []
    for name, line, lazy in imports(ast.parse(source)):
        allowed = ALLOWED[folder] | (ALLOWED_LAZILY.get(folder, set()) if lazy else set())
        foreign = within(name, {"posmask"}) and not within(name, allowed)
        if foreign or within(name, set(FOLDERS)) or (folder != "prep" and within(name, {"spacy"})):
            found.append(f"line {line}: {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_module(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert len(source.splitlines()) <= 600
    assert path.stem not in TAKEN, "a script beside it would import this file in place of the package"
    folder = path.parent.name
    assert not violations(folder, source), f"{folder} may import {sorted(ALLOWED[folder])}"


@pytest.mark.parametrize(
    ("folder", "source", "caught"),
    [
        ("kernels", "from posmask.prep.pos import UPOS", True),
        ("prep", "from posmask.kernels import philox", True),
        ("train", "from posmask.prep import tagging", True),
        ("train", "from posmask import prep", True),
        ("train", "def f():\n    import posmask.eval.run", True),
        ("train", "def f():\n    import spacy", True),
        ("train", "from posmask.prep import pos", False),
        ("eval", "from posmask.prep.tagging import load", True),
        ("eval", "def f():\n    from posmask.prep.tagging import load", False),
        ("eval", "if True:\n    import masking, train.masking", True),
    ],
)
def test_arrows_are_caught(folder, source, caught):
    assert bool(violations(folder, source)) == caught


def test_folders_are_flat_and_no_packages():
    inits = [path for folder in (*FOLDERS, "tests", "benchmarks") for path in (ROOT / folder).rglob("__init__.py")]
    assert not inits, "with one, transformers imports our kernels as its own"
    deep = [path for folder in FOLDERS for path in (ROOT / folder).glob("*/**/*.py")]
    assert not deep, "modules below a folder would be missing from the wheel"


def test_pyproject_lists_the_folders():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = project["tool"]["setuptools"]
    assert set(setuptools["packages"]) == {f"posmask.{folder}" for folder in FOLDERS}
    assert setuptools["package-dir"] == {f"posmask.{folder}": folder for folder in FOLDERS}
    for target in project["project"]["scripts"].values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / f"{module.removeprefix('posmask.').replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_training_and_evaluation_never_import_spacy():
    assert python("import sys, posmask.train.pretrain, posmask.eval.run; print('spacy' in sys.modules)") == "False"


def test_bits_need_the_standard_library_only():
    assert python("import sys, posmask.prep.pos; print({'torch', 'numpy', 'spacy'} & set(sys.modules))") == "set()"
