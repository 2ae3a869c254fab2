"""transformers is imported without its advice about PyTorch; other warnings stay."""

import subprocess
import sys

CODE = """
import logging
from clipid_utils.files import import_transformers
import_transformers()
logging.getLogger("transformers").warning("a warning of a different kind")
"""


def test_pytorch_is_not_missed_and_other_warnings_are_heard():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "PyTorch" not in done.stdout + done.stderr and "a warning of a different kind" in done.stderr
