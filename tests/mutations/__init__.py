"""The faults that tests/mutate.py puts into the kernels: three or more of each, and who has to notice."""

from mutations import cpu, cpu_rows, cuda, triton

MUTATIONS = [*cpu.MUTATIONS, *cpu_rows.MUTATIONS, *triton.MUTATIONS, *cuda.MUTATIONS]
