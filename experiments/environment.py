"""What processes of the pipeline are told through their environment; imports nothing, for a fast runner."""

# glibc hands large blocks back to the system at once, and a network takes the same ones in every step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
