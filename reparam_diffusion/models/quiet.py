"""Libraries without the notes that do not concern a person: torchvision and 4-bit kernels are not needed here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of the two libraries are told while the body runs."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    level = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()
    diffusers_log.disable_progress_bar()
    transformers_log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            yield
    finally:
        diffusers_log.set_verbosity(level[0])
        transformers_log.set_verbosity(level[1])


logging.getLogger("diffusers").addFilter(lambda record: "torchvision" not in record.getMessage())
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())
