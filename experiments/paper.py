"""Numbers that the paper prints (its Table 1, CIFAR-10, ResNet-56). Shown beside ours, marked "paper"."""

import pandas as pd

RESNET56_CIFAR10 = pd.DataFrame(
    [
        ("dense", 125.5, 93.9),
        ("LeGR 70%", 87.8, 94.1),
        ("LeGR 47%", 58.9, 93.7),
        ("DCP", 62.7, 93.5),
        ("DCP-Adapt", 66.3, 93.8),
        ("AMC", 62.7, 91.9),
        ("SFP", 59.4, 93.4),
    ],
    columns=["network", "mflops", "accuracy_percent"],
)
