"""How long the authors' procedure and ours take, as ratios measured side by side in one run (make bench)."""
