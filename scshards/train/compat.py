"""`scshards.compat` under the name that scripts import it by."""

from scshards.compat import *  # noqa: F403
from scshards.compat import __all__ as __all__
