# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that are no tests: benchmarks, load, fuzzing, the demo, and what makes the picture in README.

Each is a module to run, such as `python -m tests.programs.soak`. All but `screenshot` have a target in the
Makefile; `bench_initrd` is a part of `bench`.
"""
