"""Runs an `hba` command in this process and writes down the files of the package of which a function was called.

    python entered.py OUT.json COMMAND ...

Nothing is left out: templates that became functions count, too. A file of which only types are imported is not entered:
the bodies of modules and classes run at import, whoever needs one name of them. Worker processes are not seen, so that
commands are run with loader.workers=0.
"""

import inspect
import json
import os
import sys
import threading
from pathlib import Path

import hba
from hba.cli import main

ROOT = str(Path(hba.__file__).parent) + os.sep
entered: set[str] = set()


def note(frame, event, arg):
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(ROOT) and frame.f_code.co_flags & inspect.CO_NEWLOCALS:
        entered.add(name[len(ROOT) :])


out, sys.argv = Path(sys.argv[1]), ["hba", *sys.argv[2:]]
threading.setprofile(note)
sys.setprofile(note)
try:
    main()
finally:
    sys.setprofile(None)
    out.write_text(json.dumps(sorted(entered)), encoding="utf-8")
