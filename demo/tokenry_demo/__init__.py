"""Where the story models lie; found through the entry-point group `tokenry.models`."""

from pathlib import Path

tales_4m = Path(__file__).parent / "tales_4m"
tales_1m = Path(__file__).parent / "tales_1m"
