"""Which packages there are, and the README as a page of its own; all else is in pyproject.toml."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

# Where the README's links lead when it stands alone, such as https://github.com/OWNER/NAME. Without
# one, a link of the checkout becomes its text: no link is better than a dead one.
HOME = os.environ.get("TBQ_HOME", "").rstrip("/")
ROOT = Path(__file__).parent


def long_description() -> str:
    """Return the README with links that are absolute."""
    init = (ROOT / "tbq" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.*)"', init)[1]

    def absolute(link):
        text, target = link.groups()
        return f"[{text}]({HOME}/blob/v{version}/{target})" if HOME else text

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]\n]*)\]\((?!https?:|#)([^)\n]+)\)", absolute, readme)


# `tools` would collide with everybody's, so the programs install as tbq_tools.
setup(
    packages=[*find_packages(include=["tbq*", "gguf_io*", "cuda_port*"]), "tbq_tools"],
    package_dir={"tbq_tools": "tools"},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
