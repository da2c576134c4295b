"""Commands that wait before they give a file or a folder its name, so that a test that kills them finds them there.

    process = subprocess.Popen(command, env=held(tmp_path, "*/out/convert.json"))
    ...
    release(tmp_path)  # or a kill

`until_signalled`: a process waits until a signal has reached it that it handles, and a second more.

`until`: a test waits for what is to come. `begins_and_ends`: what another process does until a test lets it go on.
"""

import os
import time
from pathlib import Path

PATIENCE = 300  # seconds for what comes at once on an idle machine

CODE = """
import fnmatch, os, signal, time
pattern, free, heard, listen = os.environ["HELD_NAMES"], os.environ["HELD_UNTIL"], [], signal.signal
def waiting(whole):
    def call(source, target, *rest, **options):
        while fnmatch.fnmatch(os.fspath(target), pattern) and not heard and not os.path.exists(free):
            time.sleep(0.01)
        time.sleep(len(heard))  # of several processes each is told by then
        return whole(source, target, *rest, **options)
    return call
def noting(number, handler):
    def both(*told):
        heard[:] = [number]
        return handler(*told)
    return listen(number, both if callable(handler) else handler)
os.replace, os.rename = waiting(os.replace), waiting(os.rename)
if not free:
    signal.signal = noting
"""


def held(folder, pattern, *, until_signalled=False, **environment):
    """The environment of a command whose renames to a path like `pattern` wait."""
    site = Path(folder, "holding")
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(CODE)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    until = "" if until_signalled else str(site / "free")
    return os.environ | {"PYTHONPATH": path, "HELD_NAMES": pattern, "HELD_UNTIL": until} | environment


def release(folder):
    """Let all go on."""
    Path(folder, "holding", "free").touch()


def until(holds):
    """Wait for what is to come, whatever it takes."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begins_and_ends(source, where):
    """Make the file `source`.begun, and end the process once there is `source`.free."""
    Path(f"{source}.begun").touch()
    while not Path(f"{source}.free").exists():
        time.sleep(0.01)
    os._exit(9)
