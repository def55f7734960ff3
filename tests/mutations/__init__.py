"""The faults that tests/mutate.py puts into the kernels: three or more of each, and who has to notice."""

from mutations import cpu, cuda, triton

MUTATIONS = [*cpu.MUTATIONS, *triton.MUTATIONS, *cuda.MUTATIONS]
