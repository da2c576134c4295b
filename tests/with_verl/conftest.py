"""verl on a CPU, where it is installed (`make test-verl`); elsewhere these tests are skipped and say so."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
MODULES = "cpu_support,hba.rl.verl.plugin"

if find_spec("verl") is not None:  # before anything imports it
    os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": MODULES}
    sys.path.insert(0, str(HERE))
