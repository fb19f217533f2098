"""Lets torch believe in a CUDA device that does nothing (see pretend.py), in a build without CUDA
as in one with CUDA on a machine without a GPU.

To be imported before torch, in a process that does nothing else: torch asks only once whether there
is a device. guard.cpp is compiled in two seconds by g++.
"""
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path


def load():
    """Compile guard.cpp and load it. Raises OSError where that is not possible."""
    home = Path(importlib.util.find_spec("torch").origin).parent
    if "torch" in sys.modules:
        raise OSError("tools.guard must be imported before torch")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{home}/include",
                   str(Path(__file__).with_name("guard.cpp")), f"-L{home}/lib",
                   f"-Wl,-rpath,{home}/lib", "-lc10", "-ltorch_cpu", "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"g++: {done.stderr.splitlines()[0]}")
        guard = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401                  # a build with CUDA now registers its own guard
    guard.register_guard()


load()
