"""The C++ kernels, built once for each vector width. They are optional: without a compiler layers run on torch."""

import os
import platform
import sys

from setuptools import Extension, setup

SOURCES = "lightning_bln/kernels/csrc"
HEADERS = (
    "approx", "backward", "dense", "entry", "forward", "gather", "gemm", "lanes", "layout", "norm", "planes",
    "planes_backward", "planes_forward", "product", "program", "recurrence", "team",
)  # fmt: skip
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# Set by `make asan`: errors in memory access and in arithmetic end the program.
SANITIZE = (
    ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if os.environ.get("BLN_SANITIZE") else []
)
VARIANTS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"]

setup(
    ext_modules=[
        Extension(
            f"lightning_bln.kernels._recurrence_{name}",
            [f"{SOURCES}/{name}.cpp"],
            depends=[f"{SOURCES}/{header}.h" for header in HEADERS],
            extra_compile_args=FLAGS + flags + SANITIZE,
            extra_link_args=SANITIZE,
            optional=True,
        )
        for name, flags in VARIANTS.items()
        if sys.platform != "win32"
    ]
)
