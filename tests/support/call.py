"""Calls one function of the tests: `python -m support.call FILE`, where FILE is what `support.processes.call` writes."""

import pickle
import sys
from pathlib import Path

paths, called = pickle.loads(Path(sys.argv[1]).read_bytes())
sys.path[:] = paths  # where the module of the function is found
function, arguments = pickle.loads(called)
function(*arguments)
