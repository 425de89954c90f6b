"""What this machine can run, whether every engine and kernel gives the reference's numbers here, and how fast."""

from bitnet_mlx.doctor.examine import examine
from bitnet_mlx.doctor.report import Report
from bitnet_mlx.doctor.table import table

__all__ = ["Report", "examine", "table"]
