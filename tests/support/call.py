"""Calls one function of the tests: `python -m support.call FILE`, where FILE is what `support.processes.call` writes."""

import pickle
import sys
from pathlib import Path

file = Path(sys.argv[1])
paths, called = pickle.loads(file.read_bytes())
file.unlink()
sys.path[:] = paths  # where the module of the function is found
function, arguments, keywords = pickle.loads(called)
function(*arguments, **keywords)
