"""Numbers that the paper prints. Shown beside ours or apart from them, always marked "paper"."""

from dataclasses import dataclass

import pandas as pd

COLUMNS = ["network", "mflops", "accuracy_percent"]


@dataclass(frozen=True)
class Printed:
    """A table of the paper, and whether its networks saw the data that ours see."""

    table: pd.DataFrame
    source: str
    protocol: str
    data: str
    model: str

    def comparable(self, data: str) -> bool:
        """Whether accuracies on `data` may stand on one axis with the paper's."""
        return data == self.data


RESNET56_CIFAR10 = Printed(
    pd.DataFrame(
        [
            ("dense", 125.5, 93.9),
            ("LeGR 70%", 87.8, 94.1),
            ("LeGR 47%", 58.9, 93.7),
            ("DCP", 62.7, 93.5),
            ("DCP-Adapt", 66.3, 93.8),
            ("AMC", 62.7, 91.9),
            ("SFP", 59.4, 93.4),
        ],
        columns=COLUMNS,
    ),
    "Table 1",
    "CIFAR-10, 200 epochs of pre-training, 400 of fine-tuning",
    "cifar10",
    "resnet56",
)

MOBILENETV2_IMAGENET = Printed(
    pd.DataFrame(
        [
            ("dense", 300.8, 71.8),
            ("LeGR 70%", 220.0, 71.4),
            ("AMC", 220.0, 70.8),
            ("LeGR 60%", 190.0, 70.8),
            ("LeGR 50%", 160.0, 69.4),
        ],
        columns=COLUMNS,
    ),
    "Table 2",
    "ILSVRC2012, 1,000 classes, 224×224",
    "imagenet",
    "mobilenet_v2",
)

TABLES = {printed.model: printed for printed in (RESNET56_CIFAR10, MOBILENETV2_IMAGENET)}
