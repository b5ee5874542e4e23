"""Python face of the native library, with a PyTorch reference for every operation.

The native modules are compiled per instruction-set level; the best one this CPU can run is used. The
environment variable ``HASTEN_ISA`` (scalar, avx2, avx512) forces a level, so tests cover each.
"""

from hasten.kernels.native import available_levels, level, native

__all__ = ["available_levels", "level", "native"]
