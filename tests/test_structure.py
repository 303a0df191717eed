"""The shape of the code base: who imports whom, what may be named how, what training must not load."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDERS = ("prep", "train", "eval", "kernels")
# What each folder may import of ours, as module prefixes.
ALLOWED = {
    "kernels": ("posmask.kernels",),
    "prep": ("posmask.prep",),
    "train": ("posmask.train", "posmask.kernels", "posmask.prep.pos", "posmask.prep.shards"),
    "eval": ("posmask.eval", "posmask.train", "posmask.kernels", "posmask.prep.pos", "posmask.prep.shards"),
}
# A script's own folder comes first on its path, so such a file would replace the package for everybody it imports.
DEPENDENCIES = {
    "streaming", "datasets", "triton", "spacy", "deepspeed", "kernels", "torch", "numpy", "transformers", "tokenizers",
    "nvidia", "open_clip", "rich", "PIL", "pyarrow", "safetensors",
}  # fmt: skip


def folder_of(name: str) -> Path:
    return Path(find_spec(f"posmask.{name}").submodule_search_locations[0])


MODULES = [(name, path) for name in FOLDERS for path in sorted(folder_of(name).glob("*.py"))]


def test_every_folder_has_modules():
    assert {name for name, _ in MODULES} == set(FOLDERS)


@pytest.mark.parametrize(("folder", "path"), MODULES, ids=lambda value: getattr(value, "name", value))
def test_module(folder, path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    assert len(path.read_text().splitlines()) <= 600
    assert path.stem not in sys.stdlib_module_names | DEPENDENCIES
    assert path.name != "__init__.py", "with one, transformers imports our kernels as its own"
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module
            # `from posmask.train import checkpoint` imports posmask.train.checkpoint
            names = [f"{module}.{a.name}" for a in node.names] if module.count(".") < 2 else [module]
        for name in names:
            if name.startswith("posmask"):
                allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[folder])
                assert allowed, f"{path}:{node.lineno}: {folder} must not import {name}"


def test_training_and_evaluation_never_import_spacy():
    code = "import sys, posmask.train.pretrain, posmask.eval.run; print('spacy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"


def test_bits_and_kernels_need_no_heavy_import():
    code = "import sys, posmask.prep.pos; print({'torch', 'numpy', 'spacy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
