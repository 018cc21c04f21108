"""Every module imports alone, in a process that has imported none of the others."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import wanda_kernels

MODULES = sorted(module.name for module in pkgutil.walk_packages(wanda_kernels.__path__, "wanda_kernels."))
# One process has the libraries, and what any import of a module begins with, the package itself; it forks for each
# module. Importing the libraries takes seconds, torch._dynamo most of them, and the package half a second.
SCRIPT = """
import importlib, importlib.util, os, sys, traceback
import torch, torch._dynamo, torch.distributed, transformers.conversion_mapping, transformers.quantizers.base
import typer, rich.progress
if importlib.util.find_spec("peft"):
    import peft
import wanda_kernels
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(f"{name} does not import alone:", traceback.format_exc(), flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_each_module_imports_alone():
    assert len(MODULES) > 100
    said = subprocess.run([sys.executable, "-c", SCRIPT, *MODULES], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout == ""


def test_the_package_has_what_it_says():
    for name in wanda_kernels.__all__:
        assert getattr(wanda_kernels, name) is not None
    assert set(wanda_kernels.__all__) <= set(dir(wanda_kernels))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wanda_kernels.nothing  # noqa: B018
