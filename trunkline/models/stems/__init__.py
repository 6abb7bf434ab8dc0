"""Private inputs: one file for each kind of sample, and one line here."""

from collections.abc import Callable

from torch import nn

from trunkline.models.stems.channels import ChannelStem
from trunkline.models.stems.columns import ColumnStem

# kind of sample -> (numeric inputs, codes of each categorical column, width) -> stem
STEMS: dict[str, Callable[[int, tuple[int, ...], int], nn.Module]] = {
    "windows": lambda channels, categories, width: ChannelStem(channels, width),  # windows have no categorical columns
    "rows": ColumnStem,
}
