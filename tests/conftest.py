"""Why this file exists: it lets the tests, and the scripts they start, import the top level from any folder, and keeps torch to one thread."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                             # for the processes of cli.py
FOLDERS = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join(FOLDERS + ([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []))
sys.path[:0] = FOLDERS

import torch  # noqa: E402

torch.set_num_threads(1)
