"""The paper's experiments: what params.yaml may say, the data sets, the figures, and running a stage."""

# For the environment of the pipeline's processes: glibc hands large blocks back to the system at once, and a network
# takes the same ones in every step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
