"""How fast the models run, and how much of the hardware they use: `mi-jax bench`.

workloads   what is measured, at a preset's sizes, with random weights
measure     compile times, seconds, memory, and the matmul ceiling
rival       the same work in PyTorch (diffusers), in a process of its own, alternating with ours
run         one bench from its options to its result
"""
