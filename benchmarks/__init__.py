"""How fast, as ratios: each comparison is measured side by side in one run (make bench)."""
