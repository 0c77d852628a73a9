"""Seeds. Device operators draw from torch's default CPU generator here."""

import torch


def manual_seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
