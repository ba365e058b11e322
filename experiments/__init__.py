"""The paper's experiments: what params.yaml may say, the data sets, the figures, and running a stage."""

# For the environment of the pipeline's processes. A network takes the same large blocks of memory in every step, and
# glibc hands them back to the system each time; in threads other than the first, even below its thresholds. Huge pages
# cost fewer page faults.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
