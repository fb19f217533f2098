"""Lets the tests, and the scripts they start, import the top level from any folder, keeps torch to
one thread, and has the fixture that several files share."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                             # for the processes of cli.py
FOLDERS = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ["PYTHONPATH"]])
else:
    os.environ["PYTHONPATH"] = os.pathsep.join(FOLDERS)
sys.path[:0] = FOLDERS

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a small untrained SDXL pipeline."""
    from sdxl import build                      # here: other tests do without all that it imports
    return build(tmp_path_factory.mktemp("small"))
