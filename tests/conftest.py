"""Set-up for all tests: eight simulated devices, no hub, and the shapes of every call into the library checked."""

import gc
import os
import tempfile

# Before the libraries that read them; the notebooks' kernels, which tests start too, get them as well.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiled, no other and no other process does again
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ.update(JAX_COMPILATION_CACHE_DIR=COMPILED.name, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
                      JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")
# Models are small here and most of the time went into compiling them well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import matplotlib
from jaxtyping import install_import_hook

# Through jax.config, not XLA_FLAGS, which would reach the kernels that tests start.
if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

matplotlib.use("Agg")

# The same examples in each run, and no deadline: the first example of a test often waits for a compilation.
hypothesis.settings.register_profile("course", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("course")

install_import_hook("clipid_utils", "beartype.beartype")

# JAX keeps millions of objects. To look through them often, and five times at the end, would take minutes.
gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that at the end no test process waits for another."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish():
    gc.freeze()
