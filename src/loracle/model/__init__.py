"""The frozen base, the adapters on it, and the arithmetic of both."""

from logging import ERROR, getLogger

# PEFT imports bitsandbytes where it finds it, which then lists the kernels that it did not find.
getLogger("bitsandbytes").setLevel(ERROR)
