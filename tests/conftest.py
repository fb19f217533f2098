"""Why this file exists: it lets the tests import the top-level scripts from any folder, and keeps torch to one thread."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
