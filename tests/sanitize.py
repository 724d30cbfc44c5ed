"""Run the tests of compiled code with sanitizers that see any byte beyond an array, and any undefined operation.

Usage: python tests/sanitize.py [arguments of pytest]. Needs gcc with libasan and libubsan. First two faults are
planted, which must be found: otherwise nothing would be looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
COMPILED = [
    "fuzz/test_fuzz_compiled.py", "envs/test_fused.py", "envs/test_mlp.py", "envs/test_adam.py",
    "lm/kernels/test_native.py", "lm/llama",
]  # fmt: skip
SANITIZED = "gcc -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
PLANTED = {
    "AddressSanitizer: heap-buffer-overflow": "void planted(float *x, int n) { x[n] = 1.0f; }",
    "runtime error: signed integer overflow": "int planted(float *x, int n) { return n + 0x7fffffff; }",
}
CALL = """
import sys, ctypes, torch
from pathlib import Path
from grouprl.machine.compile import Kernels
x = torch.zeros(4)
Kernels(Path(sys.argv[1]), ["planted.c"]).functions().planted(ctypes.c_void_p(x.data_ptr()), 4)
"""


def environment(cache: str) -> dict[str, str]:
    """That of a Python in which compiled code is looked at; torch and Python themselves are not."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    missing = [library for library in libraries if not os.path.isabs(library)]
    if missing:
        sys.exit(f"gcc has no {' and no '.join(missing)} here; install them (Debian: libasan8, libubsan1)")
    return {
        **os.environ,
        "CC": SANITIZED,
        "XDG_CACHE_HOME": cache,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main(arguments: list[str]) -> int:
    """The exit status of pytest, once it is clear that faults are found."""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(folder)
        for message, source in PLANTED.items():
            Path(folder, "planted.c").write_text(source)
            done = subprocess.run([sys.executable, "-c", CALL, folder], env=env, capture_output=True, text=True)
            if done.returncode == 0 or message not in done.stderr:
                sys.exit(f"the sanitizers do not find what was planted ({message}):\n{done.stderr}")
            print(f"planted and found: {message}", flush=True)
        tests = [str(TESTS / name) for name in COMPILED]
        # Warnings of compilers are another matter, and so is compiling for other processors.
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "-k",
                "not without_a_warning",
                *tests,
                *arguments,
            ],
            env=env,
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
