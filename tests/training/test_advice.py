"""transformers is imported without its advice about PyTorch, and nothing else changes for the process."""

import subprocess
import sys

CODE = """
import os
from clipid_utils.files import import_transformers
before = dict(os.environ)
import_transformers()
assert dict(os.environ) == before
import logging
logging.getLogger("transformers").warning("a warning of a different kind")
"""


def test_pytorch_is_not_missed_and_other_warnings_are_heard():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "PyTorch" not in done.stdout + done.stderr and "a warning of a different kind" in done.stderr
