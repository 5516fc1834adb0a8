"""Prints pip constraints of the oldest versions that setup.cfg allows, for tools/test --minimum.

Every `name>=version` becomes `name==version`, but for torch, which stays as tools/constraints.txt has
it: an older one is another 7 GB, as its wheel comes with CUDA's. Its floor was run by hand: 2.10
trains, saves and resumes; 2.8 dies at the first checkpoint.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ("torch",)


def floors() -> dict[str, str]:
    """The oldest version of each package that setup.cfg names."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found = re.findall(
        r"^([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,<\S+)?$", "\n".join(lists), re.MULTILINE
    )
    return dict(found)


def main() -> None:
    tested = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tools/constraints.txt").read_text(), re.M)
    )
    for name, version in floors().items():
        print(f"{name}=={tested[name] if name in KEPT else version}")


if __name__ == "__main__":
    main()
