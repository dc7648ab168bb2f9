"""The name under which `tbq.quality.Distortion` was first published."""

from tbq.quality.distortion import Distortion

__all__ = ["Distortion"]
