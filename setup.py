"""The C kernels of ottava.fp8. They are optional: where they cannot be built, the torch reference does the work."""

from glob import glob

from setuptools import Extension, setup

SOURCE = "src/ottava/fp8/csrc"

setup(
    ext_modules=[
        Extension(
            "ottava.fp8._kernels",
            sorted(glob(f"{SOURCE}/*.c")),
            depends=sorted(glob(f"{SOURCE}/*.h")),
            # One source for all instruction sets: functions carry their own target attribute. Contraction would let
            # the compiler round once where the reference rounds twice.
            extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"],
            libraries=["m"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
